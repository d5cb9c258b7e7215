"""lmms-eval's results, and the metrics derived from its samples, as metrics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from bench.evaluation.config import BenchmarkConfig
from bench.evaluation.multimodal import derived
from bench.evaluation.multimodal.building import PlannedTask
from bench.evaluation.result import Metric

ACCURACIES = frozenset({"pope_accuracy"})
"""Metrics that are the mean of a score per sample, although their samples are not numbers."""


def metrics(
    benchmark: BenchmarkConfig, planned: PlannedTask, result: dict[str, Any]
) -> list[Metric]:
    """Return every metric of a task, those of the harness first."""
    samples = result["samples"][planned.name]
    row = partial(_metric, benchmark, planned)
    scored = result["results"][planned.name]
    found = _harness(row, planned, scored, samples)
    found += [
        row(each.metric, "none", each.value, each.stderr, each.n)
        for each in derived.derive(samples, scored)
    ]
    return found


def _harness(
    row: Callable[..., Metric],
    planned: PlannedTask,
    scores: dict[str, Any],
    samples: list[dict[str, Any]],
) -> list[Metric]:
    found = []
    for metric in planned.task.aggregation():
        keys = [key for key in scores if key.partition(",")[0] == metric]
        for key in keys:
            through = key.partition(",")[2]
            answered = [sample[metric] for sample in samples if metric in sample]
            # The harness's CLT standard error holds for a mean of per-sample scores; for any other
            # aggregate it would be the error of something else, so it is dropped.
            is_mean = metric in ACCURACIES or all(isinstance(a, int | float) for a in answered)
            error = scores.get(f"{metric}_stderr_clt,{through}") if is_mean else None
            stderr = None if isinstance(error, str | None) else float(error)
            found.append(row(metric, through, float(scores[key]), stderr, len(answered)))
    return found


def _metric(
    benchmark: BenchmarkConfig,
    planned: PlannedTask,
    metric: str,
    through: str,
    value: float,
    stderr: float | None,
    n: int,
) -> Metric:
    return Metric(
        benchmark=benchmark.name,
        task=planned.name,
        metric=metric,
        filter=through,
        shots=0,
        split=planned.split,
        value=value,
        stderr=stderr,
        n=n,
        higher_is_better=planned.task.higher_is_better().get(metric, True),
        headline=metric == planned.headline,
        task_version=_version(planned.task.config.metadata),
    )


def _version(metadata: Any) -> str | None:
    """Return a task's version; its file holds a mapping or a list of mappings."""
    parts = metadata if isinstance(metadata, list) else [metadata or {}]
    versions = [str(part["version"]) for part in parts if "version" in part]
    return versions[0] if versions else None
