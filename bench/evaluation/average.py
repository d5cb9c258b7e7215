"""The one number that stands for a benchmark, where there is one."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, TypeVar

from bench.evaluation.config import BenchmarkConfig
from bench.evaluation.result import Metric

if TYPE_CHECKING:
    from bench.records import MetricPart

Row = TypeVar("Row", Metric, "MetricPart")

AVERAGE = "average"

SHARES = {"mme_perception_score": "mme_perception_share"}
"""Headlines that are sums of points, and the row of the same task that says them as a share."""


def average(benchmark: BenchmarkConfig, rows: Sequence[Metric]) -> list[Metric]:
    """Return the unweighted mean of the tasks' headline metrics, if two or more can be averaged.

    Perplexities stand beside it. A sum of points (MME's) is averaged as its share of the maximum,
    because a score up to 2000 is not to be mixed with accuracies up to 1. Headlines of
    which some are better low and some high have no mean that says anything.
    """
    shown = averaged(rows, benchmark.perplexity)
    if not shown:
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


def averaged(rows: Sequence[Row], perplexity: Container[str]) -> list[Row]:
    """Return the rows whose mean is the average; none where there is no such mean.

    `perplexity` names the tasks that are perplexities. Rows are metrics fresh from a harness, or
    those of a record, in which case an average that is there already is passed over.
    """
    shown = [
        _comparable(row, rows)
        for row in rows
        if row.headline and row.task != AVERAGE and row.task not in perplexity
    ]
    mixed = len({row.higher_is_better for row in shown}) > 1
    return [] if len(shown) < 2 or mixed else shown


def _comparable(headline: Row, rows: Sequence[Row]) -> Row:
    """Return the row that stands for a headline in the mean."""
    share = SHARES.get(headline.metric)
    same = (row for row in rows if row.task == headline.task and row.metric == share)
    return next(same, headline)


def one_split(splits: set[str]) -> str:
    """Return the split that all rows share, or `mixed`."""
    return splits.pop() if len(splits) == 1 else "mixed"
