"""Sample rows of text tasks: responses, evidence of each document, and missing answers."""

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
"""Reasons why samples have no answer, by task and document id."""


def unanswered_documents(
    planned: PlannedTask, result: HarnessResult, log: EvidenceLog
) -> Unanswered:
    """Find the documents without an answer or a label, from the responses and the evidence."""
    found: Unanswered = {
        name: dict.fromkeys(planned.unlabelled.get(name, ()), NO_LABEL) for name in planned.tasks
    }
    for name, samples in result["samples"].items():
        for sample in samples:
            document = sample["doc_id"]
            # The evidence comes first, because a response of NaN does not show that the prompt was
            # too long.
            reason = log.unanswered(name, document) or _no_answer(planned.tasks[name], sample)
            if reason is not None:
                found[name].setdefault(document, reason)
    return found


def _no_answer(task: TextTask, sample: LoggedSample) -> str | None:
    """Return the reason if the responses of a sample are not a valid answer, or None."""
    responses = [response for repeats in sample["resps"] for response in repeats]
    if task.OUTPUT_TYPE == "generate_until":
        # If there are several answers, filters accept that some are empty.
        return None if any(text.strip() for text in responses) else EMPTY_ANSWER
    rolling = task.OUTPUT_TYPE == "loglikelihood_rolling"
    values = responses if rolling else [value for value, _ in responses]
    # Not left to argmax, which over NaN chooses the first answer of every question.
    return None if all(map(math.isfinite, values)) else NON_FINITE_LOGLIKELIHOOD


def sample_rows(
    planned: PlannedTask,
    result: HarnessResult,
    log: EvidenceLog,
    unanswered: Unanswered,
    conversations: Mapping[str, Conversation],
) -> list[SampleRow]:
    """Return one row per scored document and filter; rows without an answer have no scores.

    `conversations` are those of the prompts rendered with a chat template, by prompt.
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
        # For `refuse_changed_questions`, which cannot render prompts without the model's template.
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
            # All answers, because a task may sample several and let a filter vote.
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
    # Metrics with a prior repeat every choice without the question, after the normal requests.
    asked = loglikelihoods[: len(task.doc_to_choice(sample["doc"]))]
    return {**responses, "tied_choices": count_ties(asked)}


def _in_examples(
    task: TextTask, document: object, prompt: str, conversation: Conversation | None
) -> bool | None:
    """Return whether a document is among its own few-shot examples; None if there are none."""
    examples = getattr(task, "fewshot_cfg", None)
    if not task.get_config("num_fewshot") or examples is None:
        return None
    # In a rendered conversation, turns are separated by text of the template.
    if conversation is not None and conversation.repeats:
        return True
    # Rendered as an example, as in the harness's `fewshot_context`, which excludes the document but
    # not another row of the same text. With its answer, because the question alone may also be the
    # beginning of a longer one.
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
