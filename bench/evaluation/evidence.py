"""Evidence of an evaluation: what the model got of every question, and how its answers ended.

Some cases make a number less meaningful although it is computed as in the harness: prompts cut on
the left, tokens that span question and answer, or equally likely answers. They are counted per
task, with one warning per kind.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from bench.errors import UserError
from bench.evaluation.metrics import SampleRow
from bench.records.record import JsonObject, TaskEvidence
from bench.schema import Overlong
from bench.ui import Progress

Finish: TypeAlias = Literal["stop", "eos", "length"]
"""How a generated answer ended: by a stop string, an end token, or the maximum length."""
MIN_TIED_SHARE = 0.05
"""Share of questions with ties above which a warning is given; half precision causes a few."""
MIN_REPEATED_SHARE = 0.01
"""Share of repeated documents above which a warning is given; published data have a few."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as the model got it.

    `cut` is the number of tokens removed on the left; `prompt` is then the remaining text. `spans`
    says that a token contains the end of the prompt and the start of the answer. `unanswered` is
    the reason if there is no answer. `thoughts` came before the answer and are not a part of it.
    """

    prompt_tokens: int
    answer_tokens: int
    cut: int = 0
    prompt: str | None = None
    spans: bool = False
    finish: Finish | None = None
    unanswered: str | None = None
    image_sizes: tuple[str, ...] = ()
    thoughts: str | None = None


@dataclass
class EvidenceLog:
    """Requests as the model got them, by (task, document), in their order."""

    requests: dict[tuple[str, int], list[Seen]] = field(default_factory=lambda: defaultdict(list))
    settings: dict[str, JsonObject] = field(default_factory=dict)
    """Effective generation settings, by task."""

    def columns(self, task: str, document: int) -> SampleRow:
        """Return the evidence of a document as columns of its row, with one entry per request."""
        seen = self.requests.get((task, document), [])
        if not seen:
            return {}
        columns: SampleRow = {
            "prompt_tokens": [each.prompt_tokens for each in seen],
            "answer_tokens": [each.answer_tokens for each in seen],
            "finish_reasons": [each.finish for each in seen if each.finish is not None],
            "truncated_tokens": max(each.cut for each in seen),
            "spans_join": any(each.spans for each in seen),
        }
        if seen[0].image_sizes:
            columns["image_sizes"] = list(seen[0].image_sizes)
        if seen[0].thoughts is not None:
            columns["thoughts"] = [each.thoughts or "" for each in seen]
        # Otherwise the prompt is the harness's text, which the model got unchanged.
        if seen[0].prompt is not None:
            columns["prompt"] = seen[0].prompt
        return columns

    def unanswered(self, task: str, document: int) -> str | None:
        """Return why a document has no answer, if its responses do not show the reason."""
        seen = self.requests.get((task, document), [])
        return next((each.unanswered for each in seen if each.unanswered is not None), None)


def task_evidence(
    task: str, rows: Iterable[SampleRow], generation: JsonObject | None = None
) -> TaskEvidence:
    """Count the evidence over the documents of a task, from its sample rows of all filters."""
    documents = {row["doc_id"]: row for row in rows}.values()

    def count(column: str, least: int = 1) -> int:
        return sum((row.get(column) or 0) >= least for row in documents)

    return TaskEvidence(
        task=task,
        documents=len(documents),
        truncated=count("truncated_tokens"),
        longest_cut=max((row.get("truncated_tokens") or 0 for row in documents), default=0),
        spanning=count("spans_join"),
        tied=count("tied_choices", least=2),
        repeated_examples=count("in_examples"),
        generation=generation,
    )


def check_length(
    overlong: Overlong, where: str, tokens: int, longest: int, model: str
) -> str | None:
    """Return the reason why an overlong prompt is skipped, or None if it is asked.

    The reason is the same for all prompts; the number of tokens is in a column of the row.

    Raises:
        UserError: the prompt does not fit and `benchmark.overlong` refuses such prompts.
    """
    if tokens <= longest or overlong == "truncate":
        return None
    reason = f"tokens do not fit: model {model} has room for {longest}"
    if overlong == "skip":
        return f"the prompt's {reason}"
    raise UserError(
        f"{where}: {tokens} {reason}; benchmark.overlong=truncate cuts prompts on the left, skip "
        "leaves them out"
    )


def tokens_until_stop(
    tokens: Sequence[int], decode: Callable[[Sequence[int]], str], stops: Sequence[str]
) -> int:
    """Return the number of tokens after which the first stop string is complete."""

    # The length of the generated row cannot be used, because all rows of a batch have the length of
    # the longest one.
    def stopped(count: int) -> bool:
        text = decode(tokens[:count])
        return any(stop in text for stop in stops if stop)

    return bisect_left(range(len(tokens)), True, key=stopped)


def count_ties(loglikelihoods: Sequence[float]) -> int:
    """Return how many choices have the largest log-likelihood: 1 unless there is a tie."""
    return sum(value == max(loglikelihoods) for value in loglikelihoods)


def warn_about(evidence: Sequence[TaskEvidence], longest: int, progress: Progress) -> None:
    """Give one warning per kind of finding, with all tasks to which it applies."""

    def concerned(count: Callable[[TaskEvidence], int], share: float = 0.0) -> str:
        return ", ".join(
            f"{each.task} {count(each)} of {each.documents}"
            for each in evidence
            if count(each) > share * each.documents
        )

    truncated = concerned(lambda each: each.truncated)
    if truncated:
        most = max(each.longest_cut for each in evidence)
        progress.warn(
            f"prompts longer than the model's {longest} tokens were cut on the left, by up to "
            f"{most} tokens, as in lm-eval ({truncated}); benchmark.overlong=skip leaves them out"
        )
    spanning = concerned(lambda each: each.spanning)
    if spanning:
        progress.warn(
            f"a token spans the join of question and answer ({spanning}): the part of the answer "
            "that lm-eval's split leaves is scored; if it leaves nothing, the whole answer is "
            "encoded alone and scored"
        )
    tied = concerned(lambda each: each.tied, MIN_TIED_SHARE)
    if tied:
        progress.warn(
            "the best answers are equally likely, and the first of them counts, as in lm-eval "
            f"({tied})"
        )
    repeated = concerned(lambda each: each.repeated_examples)
    if repeated:
        progress.warn(f"a few-shot example contains the question and its answer ({repeated})")
    for settings in _inherited(evidence):
        progress.warn(
            f"the model's generation_config.json is in effect: {settings}; delete the file for "
            "plain decoding"
        )


def warn_about_repeats(rows: Iterable[SampleRow], progress: Progress) -> None:
    """Give a warning if many documents of a task equal an earlier one of it, which count again."""
    documents: dict[str, dict[object, object]] = defaultdict(dict)
    for row in rows:
        documents[row["task"]][row["doc_id"]] = row["doc_hash"], row.get("image_hash")
    counts = {task: len(found) - len({*found.values()}) for task, found in documents.items()}
    repeated = ", ".join(
        f"{task} {count} of {len(documents[task])}"
        for task, count in counts.items()
        if count > MIN_REPEATED_SHARE * len(documents[task])
    )
    if repeated:
        progress.warn(
            f"documents that equal an earlier one count again, as in the harness ({repeated})"
        )


def _inherited(evidence: Sequence[TaskEvidence]) -> list[str]:
    """Return the distinct settings that come from the checkpoint and not from a task."""
    found = [(each.generation or {}).get("from_checkpoint", {}) for each in evidence]
    texts = [", ".join(f"{name}={value}" for name, value in each.items()) for each in found]
    return list(dict.fromkeys(filter(None, texts)))


SAMPLING_SETTINGS = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"}
)
_OTHER_SETTINGS = frozenset(
    {
        "_from_model_config", "transformers_version", "bos_token_id", "eos_token_id",
        "pad_token_id", "use_cache", "cache_implementation", "output_attentions",
        "output_hidden_states", "return_dict_in_generate", "max_length", "remove_invalid_values",
    }
)  # fmt: skip
"""Settings of a checkpoint that change no answer, or that every task sets itself."""


def settings_in_force(
    checkpoint: Mapping[str, object], requested: Mapping[str, object], **always: object
) -> JsonObject:
    """Return the effective settings of a generation: the requested ones and the checkpoint's.

    `checkpoint` are the settings of its generation config that differ from the defaults.
    """
    ignored = _OTHER_SETTINGS | requested.keys() | always.keys()
    if not requested.get("do_sample"):
        ignored |= SAMPLING_SETTINGS | {"do_sample"}
    added = {name: value for name, value in sorted(checkpoint.items()) if name not in ignored}
    return {**requested, **always, "from_checkpoint": added}
