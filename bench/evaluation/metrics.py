"""Metrics and sample rows of an evaluation, and the one number that stands for a benchmark."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from bench.errors import UserError
from bench.records.record import AVERAGE, Metric, MissingMeasurement, TaskEvidence
from bench.schema import BenchmarkConfig

LoggedSample: TypeAlias = Mapping[str, Any]
"""A scored document as a harness logs it; each task adds its metrics as keys."""
SampleRow: TypeAlias = dict[str, Any]
"""One scored sample: the columns of `SAMPLE_COLUMNS`, its metrics, and what its task adds."""


def task_metric(
    benchmark: BenchmarkConfig,
    task: str,
    metric: str,
    value: float | None,
    *,
    split: str,
    n: int,
    stderr: float | None = None,
    through: str = "none",
    shots: int = 0,
    higher_is_better: bool = True,
    headline: bool = True,
    task_version: str | None = None,
    truncated: int | None = None,
    missing: int = 0,
) -> Metric:
    """Return a metric of a task; `through` is its filter, `none` if there is no choice."""
    return Metric(
        benchmark=benchmark.name,
        task=task,
        metric=metric,
        filter=through,
        shots=shots,
        split=split,
        value=value,
        stderr=stderr,
        n=n,
        higher_is_better=higher_is_better,
        headline=headline,
        task_version=task_version,
        truncated=truncated,
        missing=missing,
    )


NON_FINITE_LOGLIKELIHOOD = "a log-likelihood is not finite"
NON_FINITE_LOGITS = "the logits are not finite"
EMPTY_ANSWER = "the generated text is empty"
NO_LABEL = "the row has no label"
NO_NUMBER = "what the harness makes of the answers is no finite number"
"""Reasons why a sample has no answer, or a task no number."""
NAMED_ROWS = 5
"""Rows that a sentence about missing answers names; the samples of a run name all of them."""
NAMED_REASONS = 5
"""Reasons that it names: those of most rows, since a reason may name a row's own file."""


@dataclass(frozen=True)
class TaskAnswers:
    """The number of scored rows of a task, and those without an answer, each with the reason.

    A row is named by its document id; in a group of tasks, by its task and document id.
    """

    total: int
    unanswered: Mapping[str, str] = field(default_factory=dict)

    def suffice(self, allowed: float) -> bool:
        """Whether a number over the answered rows may stand for the task."""
        missing = len(self.unanswered)
        # Divided, not multiplied: 29 / 100 is the float 0.29, while 0.29 * 100 is below 29.
        return missing < self.total and missing / self.total <= allowed

    def describe(self) -> str:
        """Return how many rows have no answer, the most frequent reasons, and the first rows."""
        rows_by_reason: dict[str, list[str]] = defaultdict(list)
        for row, reason in self.unanswered.items():
            rows_by_reason[reason].append(row)
        groups = sorted(rows_by_reason.items(), key=lambda group: -len(group[1]))
        parts = [f"{reason} ({_row_names(rows)})" for reason, rows in groups[:NAMED_REASONS]]
        rest = [row for _, rows in groups[NAMED_REASONS:] for row in rows]
        if rest:
            parts.append(f"other reasons ({_row_names(rest)})")
        return f"{len(self.unanswered)} of {self.total} rows have no answer: {'; '.join(parts)}"


def _row_names(rows: Sequence[str]) -> str:
    more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(rows[:NAMED_ROWS])}{more}"


def settle_metrics(
    metrics: Sequence[Metric], answers: TaskAnswers, allowed: float
) -> tuple[list[Metric], list[MissingMeasurement]]:
    """Count missing answers in a task's metrics; drop the values if too many are missing.

    `metrics` are over the answered rows. Returns them, and what is missing from the headlines.
    """
    metrics, gaps = _finite_only(metrics)
    if not answers.unanswered:
        return metrics, gaps
    missing = len(answers.unanswered)
    if answers.suffice(allowed):
        return [metric.model_copy(update={"missing": missing}) for metric in metrics], gaps
    blank = {"value": None, "stderr": None, "n": answers.total - missing, "missing": missing}
    reason = f"{answers.describe()}; benchmark.allow_missing={allowed:g}"
    return (
        [metric.model_copy(update=blank) for metric in metrics],
        [
            MissingMeasurement(scope=metric.task, quantity=metric.metric, reason=reason)
            for metric in metrics
            if metric.headline
        ],
    )


def aggregate_number(value: Any) -> float:
    """Return an aggregate of a harness as a number; NaN for a table by subject or a text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _finite_only(metrics: Sequence[Metric]) -> tuple[list[Metric], list[MissingMeasurement]]:
    """Drop values that are no finite number, and return what headlines lose by that."""
    finite = [metric.value is not None and math.isfinite(metric.value) for metric in metrics]
    none = {"value": None, "stderr": None}
    gaps = [
        MissingMeasurement(scope=metric.task, quantity=metric.metric, reason=NO_NUMBER)
        for metric, fits in zip(metrics, finite, strict=True)
        if metric.headline and not fits
    ]
    kept = [
        metric if fits else metric.model_copy(update=none)
        for metric, fits in zip(metrics, finite, strict=True)
    ]
    return kept, gaps


@dataclass(frozen=True)
class Evaluation:
    """All metrics of one model on one benchmark, and one row per scored sample.

    `missing` names the headlines without a value, with the reason.
    `backend` is the backend report as JSON, None for harnesses without a choice of backend.
    `evidence` says per task what its numbers rest on.
    """

    metrics: tuple[Metric, ...]
    samples: tuple[SampleRow, ...]
    backend: dict[str, object] | None = None
    missing: tuple[MissingMeasurement, ...] = ()
    evidence: tuple[TaskEvidence, ...] = ()


SHARE_METRICS = {"mme_perception_score": "mme_perception_share"}
"""Headline metrics that are sums of points, and the metric of the same task that scales them."""


def headline_average(benchmark: BenchmarkConfig, rows: Sequence[Metric]) -> list[Metric]:
    """Return the unweighted mean of the headline metrics as a list of one, or an empty list.

    Perplexities are left out. A sum of points (MME, up to 2000) enters as its share of the maximum,
    since it cannot be averaged with accuracies in [0, 1]. There is no average of fewer than two
    headline metrics, nor of metrics of which some are better high and some better low, nor of
    numbers above 1 (BLEU, the F1 of SQuAD v2), which are no shares. Its value is
    None if a headline has none: a mean of the remaining tasks would be a different number. Its `n`
    counts the tasks, its `missing` the rows without an answer in all of them.
    """
    shown = averaged_headlines(rows, benchmark.perplexity)
    if not shown:
        return []
    errors = [row.stderr for row in shown if row.stderr is not None]
    known = len(errors) == len(shown)
    values = [row.value for row in shown if row.value is not None]
    return [
        task_metric(
            benchmark,
            AVERAGE,
            "mean",
            math.fsum(values) / len(shown) if len(values) == len(shown) else None,
            split=common_split({row.split for row in shown}),
            shots=max(row.shots for row in shown),
            # Standard error of a mean of independent estimates: sqrt(sum of squares) / n. One
            # unknown error makes the whole unknown; treating it as 0 would understate it.
            stderr=math.hypot(*errors) / len(shown) if known else None,
            n=len(shown),
            higher_is_better=shown[0].higher_is_better,
            missing=sum(row.missing for row in shown),
        )
    ]


def missing_average(average: Metric, rows: Sequence[Metric]) -> MissingMeasurement:
    """Return why an average has no value."""
    gone = [row.task for row in rows if row.headline and row.value is None]
    reason = f"{', '.join(gone)} {'has' if len(gone) == 1 else 'have'} no value"
    return MissingMeasurement(scope=average.task, quantity=average.metric, reason=reason)


def averaged_headlines(rows: Sequence[Metric], perplexity: Container[str]) -> list[Metric]:
    """Return the metrics whose mean is the average; empty if no average is defined.

    `perplexity` holds the names of the perplexities. `rows` are metrics fresh from a harness, or
    those of a record; an average that is already among them is skipped.
    """
    shown = [
        _comparable(row, rows)
        for row in rows
        if row.headline and row.task != AVERAGE and row.task not in perplexity
    ]
    mixed = len({row.higher_is_better for row in shown}) > 1
    # An accuracy and a BLEU of 31 have no mean; and every mean is shown in %.
    no_share = any(row.value is not None and abs(row.value) > 1 for row in shown)
    return [] if len(shown) < 2 or mixed or no_share else shown


def _comparable(headline: Metric, rows: Sequence[Metric]) -> Metric:
    """Return the metric that represents a headline in the mean: its share, if it has one."""
    share = SHARE_METRICS.get(headline.metric)
    same = (row for row in rows if row.task == headline.task and row.metric == share)
    return next(same, headline)


def common_split(splits: set[str]) -> str:
    """Return the split that all rows share, or `mixed`."""
    return splits.pop() if len(splits) == 1 else "mixed"


def sample_score(value: object) -> float | None:
    """Return a sample's own score, or None if the metric is defined over several samples only."""
    # lm-eval logs a tuple of references and predictions for corpus metrics (BLEU, F1 and the like),
    # lmms-eval a mapping with the score and what it is aggregated by.
    if isinstance(value, dict):
        value = value.get("score")
    return float(value) if isinstance(value, int | float) else None


SAMPLE_COLUMNS: dict[str, object] = {
    "task": None,
    "filter": None,
    "doc_id": None,
    "doc_hash": None,
    "prompt_hash": None,
    "target": None,
    "prompt": None,
    "choices": (),
    "loglikelihoods": (),
    "greedy": (),
    "response": None,
    "generations": (),
    "finish_reasons": (),
    "prompt_tokens": (),
    "answer_tokens": (),
    "truncated_tokens": None,
    "spans_join": None,
    "tied_choices": None,
    "in_examples": None,
    "n_tokens": None,
    "missing": None,
}
"""First columns of every sample row, with the value used where a task has none."""
SAMPLE_METRICS = ("acc", "acc_norm", "exact_match")
"""Metric columns that are always present; further metrics append theirs."""


ASKED = {
    "doc_hash": "document",
    "prompt_hash": "prompt",
    "question_hash": "prompt",
    "choices": "choices",
}
"""Columns that say what was asked, and what each is called; those that a row lacks are empty."""


def refuse_changed_questions(stored: Sequence[SampleRow], found: Sequence[SampleRow]) -> None:
    """Raise if the rows of a run and those that are made now ask for different things.

    Raises:
        UserError: a task was edited since, so that the stored answers are to other questions.
    """
    present = {(row["task"], row["doc_id"]): row for row in found}
    tasks = {task for task, _ in present}
    for row in stored:
        task, document = row["task"], row["doc_id"]
        now = present.get((task, document), {})
        changed = dict.fromkeys(
            word
            for column, word in _asked(row).items()
            if task in tasks and row.get(column) and row[column] != now.get(column)
        )
        if changed:
            raise UserError(
                f"task {task}, document {document}: not what the run asked (different: "
                f"{', '.join(changed)}), so its stored answers cannot be scored: undo the edit of "
                "the task, or evaluate again with `bench run`"
            )


def _asked(row: SampleRow) -> dict[str, str]:
    # A prompt that the model's own template rendered cannot be rendered again without the model.
    rendered = row.get("question_hash")
    return {
        column: word for column, word in ASKED.items() if column != "prompt_hash" or not rendered
    }


def align_rows(rows: Sequence[SampleRow]) -> tuple[SampleRow, ...]:
    """Give all rows the same columns in the same order; a missing list is empty, the rest None."""
    extra = dict.fromkeys(key for row in rows for key in row if key not in SAMPLE_COLUMNS)
    blank = {**SAMPLE_COLUMNS, **dict.fromkeys(SAMPLE_METRICS), **dict.fromkeys(extra)}
    whole = ({**blank, **row} for row in rows)
    # Blanks are tuples, and every row gets a list of its own: a shared list would alias all rows.
    return tuple(
        {name: list(value) if value == () else value for name, value in row.items()}
        for row in whole
    )
