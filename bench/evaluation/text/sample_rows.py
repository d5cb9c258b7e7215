"""Sample rows of text tasks: responses, what the model saw of a document, and missing answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypedDict

from bench.evaluation.evidence import EvidenceLog, count_ties
from bench.evaluation.metrics import (
    EMPTY_ANSWER,
    NO_LABEL,
    NON_FINITE_LOGLIKELIHOOD,
    LoggedSample,
    SampleRow,
    sample_score,
)
from bench.evaluation.text.chat import Conversation
from bench.evaluation.text.planned_tasks import PlannedTask, TextTask

HarnessResult = TypedDict(
    "HarnessResult",
    {
        "results": dict[str, dict[str, float | str]],
        "higher_is_better": dict[str, dict[str, bool | None]],
        "versions": dict[str, float | str | None],
        "n-shot": dict[str, int | None],
        "n-samples": dict[str, dict[str, int]],
        "samples": dict[str, list[LoggedSample]],
    },
)
"""Results of lm-eval: scores by task or group, their labels, and the scored documents."""
Unanswered: TypeAlias = dict[str, dict[int, str]]
"""By task: the document ids of the samples without an answer, each with the reason."""


def unanswered_documents(
    planned: PlannedTask, result: HarnessResult, log: EvidenceLog
) -> Unanswered:
    """Find the documents without an answer or a label, in the responses and in what was seen."""
    found: Unanswered = {
        name: dict.fromkeys(planned.unlabelled.get(name, ()), NO_LABEL) for name in planned.tasks
    }
    for name, samples in result["samples"].items():
        for sample in samples:
            document = sample["doc_id"]
            # First what was seen: a response of NaN does not say that the prompt was too long.
            reason = log.unanswered(name, document) or _no_answer(planned.tasks[name], sample)
            if reason is not None:
                found[name].setdefault(document, reason)
    return found


def _no_answer(task: TextTask, sample: LoggedSample) -> str | None:
    """Return why the responses of a sample are no answer, or None if they are one."""
    responses = [response for repeats in sample["resps"] for response in repeats]
    if task.OUTPUT_TYPE == "generate_until":
        # Of several answers to one question some may be empty; the filters expect that.
        return None if any(text.strip() for text in responses) else EMPTY_ANSWER
    rolling = task.OUTPUT_TYPE == "loglikelihood_rolling"
    values = responses if rolling else [value for value, _ in responses]
    # argmax over NaN is a choice all the same: the first one, for every question.
    return None if all(map(math.isfinite, values)) else NON_FINITE_LOGLIKELIHOOD


def sample_rows(
    planned: PlannedTask,
    result: HarnessResult,
    log: EvidenceLog,
    unanswered: Unanswered,
    conversations: Mapping[str, Conversation],
) -> list[SampleRow]:
    """Return one row per scored document and filter; without an answer it has no scores.

    `conversations` are those behind the prompts that a chat template rendered.
    """
    return [
        _sample_row(
            name,
            planned.tasks[name],
            sample,
            log,
            unanswered[name].get(sample["doc_id"]),
            conversations.get(sample["arguments"][0][0]),
        )
        for name, samples in result["samples"].items()
        for sample in samples
    ]


def _sample_row(
    name: str,
    task: TextTask,
    sample: LoggedSample,
    log: EvidenceLog,
    missing: str | None,
    conversation: Conversation | None,
) -> SampleRow:
    first = sample["arguments"][0]
    return {
        "task": name,
        "filter": sample["filter"],
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "prompt_hash": sample["prompt_hash"],
        # Without the model's template no prompt can be rendered to compare.
        **({} if conversation is None else {"question_hash": conversation.question}),
        "target": str(sample["target"]),
        "prompt": first[0],
        "choices": _choices(task, sample),
        **_responses(task, sample),
        "in_examples": _in_examples(task, sample["doc"], first[0], conversation),
        **log.columns(name, sample["doc_id"]),
        **{
            metric: None if missing else sample_score(sample[metric])
            for metric in sample["metrics"]
        },
        "missing": missing,
    }


def _choices(task: TextTask, sample: LoggedSample) -> list[str]:
    if task.OUTPUT_TYPE == "multiple_choice":
        return [str(choice) for choice in task.doc_to_choice(sample["doc"])]
    if task.OUTPUT_TYPE == "loglikelihood":
        return [argument[1] for argument in sample["arguments"]]
    return []


def _responses(task: TextTask, sample: LoggedSample) -> SampleRow:
    """Return the model's responses: scores of choices, or texts before and after the filter."""
    raw = [responses[0] for responses in sample["resps"]]
    if task.OUTPUT_TYPE == "generate_until":
        filtered = sample["filtered_resps"][0]
        return {
            "response": filtered if isinstance(filtered, str) else raw[0],
            # All of them: a task may draw several answers and let a filter vote.
            "generations": list(sample["resps"][0]),
        }
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return {"loglikelihoods": [float(value) for value in raw]}
    loglikelihoods = [float(value) for value, _ in raw]
    responses = {
        "loglikelihoods": loglikelihoods,
        "greedy": [bool(greedy) for _, greedy in raw],
    }
    if task.OUTPUT_TYPE != "multiple_choice":
        return responses
    # Metrics that correct for a prior ask for every choice again, without the question.
    asked = loglikelihoods[: len(task.doc_to_choice(sample["doc"]))]
    return {**responses, "tied_choices": count_ties(asked)}


def _in_examples(
    task: TextTask, document: object, prompt: str, conversation: Conversation | None
) -> bool | None:
    """Return whether a document is among its own few-shot examples; None if there are none."""
    examples = getattr(task, "fewshot_cfg", None)
    if not task.get_config("num_fewshot") or examples is None:
        return None
    # Between turns stands what the template puts there.
    if conversation is not None and conversation.repeats:
        return True
    # Rendered as an example, exactly as the harness does it in `fewshot_context`: it leaves out the
    # document itself, but not a second row of the same text. That row may have another answer, but
    # the question alone may also be the beginning of a longer one.
    own = examples.doc_to_choice
    question = task.doc_to_text(document, examples.doc_to_text)
    choices = task.doc_to_choice(document, own) if own else None
    answers: Sequence[object] = [task.doc_to_target(document, examples.doc_to_target)]
    if task.multiple_input and choices:
        question, choices = choices[int(question)], None
    elif choices:
        answers = range(len(choices))
    for answer in answers:
        turns = task.build_qa_turn(
            q=question,
            c=choices,
            a=answer,
            gen_prefix=task.resolve_field(document, examples.gen_prefix),
            tgt_delim=examples.target_delimiter,
            few_delim=examples.fewshot_delimiter,
        )
        if "".join(turn.to_text() for turn in turns) in prompt:
            return True
    return False
