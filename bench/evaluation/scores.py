"""The harness's results as rows of metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bench.evaluation.building import PlannedTask
from bench.evaluation.config import BenchmarkConfig
from bench.evaluation.definition import evaluated_split
from bench.evaluation.result import Metric

AVERAGE = "average"


def metrics(
    benchmark: BenchmarkConfig, planned: PlannedTask, result: dict[str, Any]
) -> list[Metric]:
    """Return every metric that the harness gives for a task, or for a group and its tasks."""
    rows: list[Metric] = []
    for name, scores in result["results"].items():
        keys = [key for key in scores if "," in key and "_stderr," not in key]
        shown = _headline_key(planned, keys) if name == planned.name else None
        rows += [
            _metric(benchmark, planned, result, name, key, headline=key == shown) for key in keys
        ]
    return rows


def _headline_key(planned: PlannedTask, keys: Sequence[str]) -> str | None:
    metric, chosen = planned.headline
    wanted = [key for key in keys if key.partition(",")[0] == metric]
    return next((key for key in wanted if chosen in (None, key.partition(",")[2])), None)


def _metric(
    benchmark: BenchmarkConfig,
    planned: PlannedTask,
    result: dict[str, Any],
    name: str,
    key: str,
    *,
    headline: bool,
) -> Metric:
    metric, _, through = key.partition(",")
    scores = result["results"][name]
    error = scores.get(f"{metric}_stderr,{through}")
    better = result["higher_is_better"].get(name, {}).get(metric)
    version = result["versions"].get(name)
    leaves = _leaves(planned, name)
    return Metric(
        benchmark=benchmark.name,
        task=name,
        metric=metric,
        filter=through,
        shots=int(result["n-shot"].get(name) or 0),
        split=_one({evaluated_split(vars(planned.tasks[leaf].config)) for leaf in leaves}),
        value=float(scores[key]),
        stderr=float(error) if isinstance(error, float) else None,
        n=sum(result["n-samples"][leaf]["effective"] for leaf in leaves),
        higher_is_better=better is not False,
        headline=headline,
        task_version=None if version in (None, "N/A") else str(version),
    )


def _leaves(planned: PlannedTask, name: str) -> list[str]:
    """Return the tasks that a row is about: itself, or those below a group."""
    if name in planned.tasks:
        return [name]
    return [task.task_name for task in planned.groups[name].get_all_tasks()]


def average(benchmark: BenchmarkConfig, rows: Sequence[Metric]) -> list[Metric]:
    """Return the unweighted mean of the headline metrics, if two or more can be averaged.

    Headlines of which some are better low and some high have no mean that says anything.
    """
    shown = [row for row in rows if row.headline]
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
            split=_one({row.split for row in shown}),
            value=math.fsum(row.value for row in shown) / len(shown),
            stderr=math.hypot(*errors) / len(shown) if known else None,
            n=len(shown),
            higher_is_better=shown[0].higher_is_better,
            headline=True,
            task_version=None,
        )
    ]


def _one(splits: set[str]) -> str:
    return splits.pop() if len(splits) == 1 else "mixed"
