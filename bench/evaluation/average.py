"""The average of a benchmark: one number over the headline metrics of its tasks."""

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
"""Headline metrics that are sums of points, and the metric of the same task that scales them."""


def average(benchmark: BenchmarkConfig, rows: Sequence[Metric]) -> list[Metric]:
    """Return the unweighted mean of the headline metrics as a list of one, or an empty list.

    Perplexities are left out. A sum of points (MME, up to 2000) enters as its share of the maximum,
    since it cannot be averaged with accuracies in [0, 1]. There is no average of fewer than two
    headline metrics, nor of metrics of which some are better high and some better low.
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
            # Standard error of a mean of independent estimates: sqrt(sum of squares) / n. One
            # unknown error makes the whole unknown; treating it as 0 would understate it.
            stderr=math.hypot(*errors) / len(shown) if known else None,
            n=len(shown),
            higher_is_better=shown[0].higher_is_better,
            headline=True,
            task_version=None,
        )
    ]


def averaged(rows: Sequence[Row], perplexity: Container[str]) -> list[Row]:
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
    return [] if len(shown) < 2 or mixed else shown


def _comparable(headline: Row, rows: Sequence[Row]) -> Row:
    """Return the metric that represents a headline in the mean: its share, if it has one."""
    share = SHARES.get(headline.metric)
    same = (row for row in rows if row.task == headline.task and row.metric == share)
    return next(same, headline)


def one_split(splits: set[str]) -> str:
    """Return the split that all rows share, or `mixed`."""
    return splits.pop() if len(splits) == 1 else "mixed"
