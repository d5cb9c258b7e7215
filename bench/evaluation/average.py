"""The one number that stands for a benchmark, where there is one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.evaluation.config import BenchmarkConfig
from bench.evaluation.result import Metric

AVERAGE = "average"

SHARES = {"mme_perception_score": "mme_perception_share"}
"""Headlines that are sums of points, and the row of the same task that says them as a share."""


def average(benchmark: BenchmarkConfig, rows: Sequence[Metric]) -> list[Metric]:
    """Return the unweighted mean of the tasks' headline metrics, if two or more can be averaged.

    Perplexities stand beside it. A sum of points (MME's) is averaged as its share of the maximum,
    because a score up to 2000 is not to be mixed with accuracies up to 1. Headlines of
    which some are better low and some high have no mean that says anything.
    """
    shown = [
        _comparable(row, rows)
        for row in rows
        if row.headline and row.task not in benchmark.perplexity
    ]
    if len(shown) < 2 or len({row.higher_is_better for row in shown}) > 1:
        return []
    errors = [row.stderr for row in shown if row.stderr is not None]
    known = len(errors) == len(shown)
    return [
        Metric(
            benchmark=benchmark.name,
            task=AVERAGE,
            metric="mean",
            filter="none",
            shots=max(row.shots for row in shown),
            split=one_split({row.split for row in shown}),
            value=math.fsum(row.value for row in shown) / len(shown),
            stderr=math.hypot(*errors) / len(shown) if known else None,
            n=len(shown),
            higher_is_better=shown[0].higher_is_better,
            headline=True,
            task_version=None,
        )
    ]


def _comparable(headline: Metric, rows: Sequence[Metric]) -> Metric:
    """Return the row that stands for a headline in the mean."""
    share = SHARES.get(headline.metric)
    same = (row for row in rows if row.task == headline.task and row.metric == share)
    return next(same, headline)


def one_split(splits: set[str]) -> str:
    """Return the split that all rows share, or `mixed`."""
    return splits.pop() if len(splits) == 1 else "mixed"
