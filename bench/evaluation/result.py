"""Result of an evaluation: metrics for the record, sample rows for paired comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One number with all that is needed to compare it with another.

    `headline` marks the single metric that represents its task; `split` and `filter` are the
    harness's names. In the metric of task `average`, `n` is the number of tasks averaged.
    """

    benchmark: str
    task: str
    metric: str
    filter: str
    shots: int
    split: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool
    headline: bool
    task_version: str | None


@dataclass(frozen=True)
class Evaluation:
    """All metrics of one model on one benchmark, and one row per scored sample.

    `engine` is the backend report as JSON, None for harnesses without a choice of backend.
    """

    metrics: tuple[Metric, ...]
    samples: tuple[dict[str, Any], ...]
    engine: dict[str, Any] | None = None
