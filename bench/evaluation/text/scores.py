"""lm-eval's results as metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.evaluation.average import one_split
from bench.evaluation.config import BenchmarkConfig
from bench.evaluation.result import Metric
from bench.evaluation.text.building import PlannedTask
from bench.evaluation.text.definition import evaluated_split


def metrics(
    benchmark: BenchmarkConfig, planned: PlannedTask, result: dict[str, Any]
) -> list[Metric]:
    """Return every metric that the harness reports for a task, or for a group and its tasks."""
    rows: list[Metric] = []
    for name, scores in result["results"].items():
        # Results are keyed `METRIC,FILTER`; standard errors stand among them as
        # `METRIC_stderr,FILTER`, and keys without a comma are labels and counts.
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
    # The value is "N/A" where the harness computed none.
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
        split=one_split({evaluated_split(vars(planned.tasks[leaf].config)) for leaf in leaves}),
        value=float(scores[key]),
        stderr=float(error) if isinstance(error, float) else None,
        n=sum(result["n-samples"][leaf]["effective"] for leaf in leaves),
        higher_is_better=better is not False,
        headline=headline,
        task_version=None if version in (None, "N/A") else str(version),
    )


def _leaves(planned: PlannedTask, name: str) -> list[str]:
    """Return the tasks that a row covers: itself, or the tasks below a group."""
    if name in planned.tasks:
        return [name]
    return [task.task_name for task in planned.groups[name].get_all_tasks()]
