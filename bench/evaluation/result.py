"""What an evaluation produces: metrics for the record, samples for paired comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One number with everything that makes it comparable to another.

    `headline` marks the one metric per task that stands for it; `split` and `filter` are the
    harness's names. In the row of task `average`, `n` counts the tasks averaged.
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
    """All metrics of one model on one benchmark, and a row for every scored sample.

    `engine` says by which engine the model was asked, and why; None where there is no choice.
    """

    metrics: tuple[Metric, ...]
    samples: tuple[dict[str, Any], ...]
    engine: dict[str, Any] | None = None
