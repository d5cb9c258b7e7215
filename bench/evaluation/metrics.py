"""Metrics and sample rows of an evaluation, and the average that summarises a benchmark."""

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
"""One scored sample: the columns of `SAMPLE_COLUMNS`, its metrics, and columns of its task."""


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
    """Return a metric of a task; `through` is the name of its filter, or `none`."""
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
NO_NUMBER = "the harness's result for the answers is not a finite number"
"""Reason why a sample has no score, or a task no value."""
NAMED_ROWS = 5
"""Maximum number of rows in a message about missing answers; samples.parquet has all of them."""
NAMED_REASONS = 5
"""Maximum number of reasons in such a message, the most frequent ones."""


@dataclass(frozen=True)
class TaskAnswers:
    """The number of scored rows of a task, and the reasons of those without an answer.

    The key of a row is its document id or, in a group of tasks, its task and document id.
    """

    total: int
    unanswered: Mapping[str, str] = field(default_factory=dict)

    def suffice(self, allowed: float) -> bool:
        """Whether enough rows are answered for a value of the task."""
        missing = len(self.unanswered)
        # Divided instead of multiplied, because 29 / 100 == 0.29, but 0.29 * 100 < 29.
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
    """Add the number of missing answers to a task's metrics; drop values if too many are missing.

    `metrics` are computed over the answered rows. Return the metrics, and the missing headlines.
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
    """Convert an aggregate of a harness to a number; NaN for a table by subject or a string."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _finite_only(metrics: Sequence[Metric]) -> tuple[list[Metric], list[MissingMeasurement]]:
    """Drop values that are not finite; return the metrics, and the missing headlines."""
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

    `missing` lists the headlines without a value, with the reason. `backend` is the backend report
    as JSON, or None for harnesses with a single backend. `evidence` is that of each task
    (`bench.evaluation.evidence`).
    """

    metrics: tuple[Metric, ...]
    samples: tuple[SampleRow, ...]
    backend: dict[str, object] | None = None
    missing: tuple[MissingMeasurement, ...] = ()
    evidence: tuple[TaskEvidence, ...] = ()


SHARE_METRICS = {"mme_perception_score": "mme_perception_share"}
"""Headline metrics that are sums of points, and the metric of the task with their share."""


def headline_average(benchmark: BenchmarkConfig, rows: Sequence[Metric]) -> list[Metric]:
    """Return the unweighted mean of the headline metrics as a list of one, or an empty list.

    Perplexities are left out. A sum of points (MME, up to 2000) is averaged as its share of the
    maximum. There is no average of fewer than two headline metrics, of metrics with different
    directions (higher or lower is better), or of numbers above 1 (BLEU, the F1 of SQuAD v2), which
    are not shares. The value is None if a headline has no value, because a mean of the other tasks
    would be a different quantity. `n` is the number of tasks, `missing` the number of rows without
    an answer in all of them.
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
            # The standard error of a mean of independent estimates is sqrt(sum of squares) / n. It
            # is unknown if one of them is, because treating that one as 0 would understate it.
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

    `perplexity` has the names of the perplexities. `rows` are metrics of a harness or of a record;
    an average among them is skipped.
    """
    shown = [
        _comparable(row, rows)
        for row in rows
        if row.headline and row.task != AVERAGE and row.task not in perplexity
    ]
    mixed = len({row.higher_is_better for row in shown}) > 1
    # An accuracy and a BLEU of 31 cannot be averaged; averages are displayed in %.
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
    """Return a sample's own score, or None if the metric is defined only over several samples."""
    # For corpus metrics (such as BLEU and F1) lm-eval logs a tuple of references and predictions.
    # lmms-eval logs a mapping with the score and the key by which it is aggregated.
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
"""First columns of every sample row, with the default value of each."""
SAMPLE_METRICS = ("acc", "acc_norm", "exact_match")
"""Metric columns that are always present; those of other metrics follow."""


ASKED = {
    "doc_hash": "document",
    "prompt_hash": "prompt",
    "question_hash": "prompt",
    "choices": "choices",
}
"""Columns that describe the question, with a word for each; a row may lack some of them."""


def refuse_changed_questions(stored: Sequence[SampleRow], found: Sequence[SampleRow]) -> None:
    """Raise if stored rows and newly built rows have different questions.

    Raises:
        UserError: a task was edited since the run, so that its answers do not fit the questions.
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
                f"task {task}, document {document}: the question differs from that of the run "
                f"(different: {', '.join(changed)}), so the stored answers cannot be scored: undo "
                "the edit of the task, or evaluate again with `bench run`"
            )


def _asked(row: SampleRow) -> dict[str, str]:
    # A prompt rendered with the model's own template cannot be rendered without the model.
    rendered = row.get("question_hash")
    return {
        column: word for column, word in ASKED.items() if column != "prompt_hash" or not rendered
    }


def align_rows(rows: Sequence[SampleRow]) -> tuple[SampleRow, ...]:
    """Give all rows the same columns in the same order; missing values are [] or None."""
    extra = dict.fromkeys(key for row in rows for key in row if key not in SAMPLE_COLUMNS)
    blank = {**SAMPLE_COLUMNS, **dict.fromkeys(SAMPLE_METRICS), **dict.fromkeys(extra)}
    whole = ({**blank, **row} for row in rows)
    # Default lists are stored as tuples and copied, so that rows do not share a list.
    return tuple(
        {name: list(value) if value == () else value for name, value in row.items()}
        for row in whole
    )
