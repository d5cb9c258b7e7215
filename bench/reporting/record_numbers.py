"""Rules for reading the numbers of a record, shared by all reports.

They say how a metric is shown, when two metrics are the same number, what was scored on what, and
what the methods did to the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from bench.evaluation.metrics import AVERAGE

if TYPE_CHECKING:
    from bench.records import AppliedMethod, Metric, Record

PERCENT_METRICS = frozenset(
    {"acc", "acc_norm", "exact_match", "f1", "mean", "mc1", "mc2"}
    | {"pope_accuracy", "pope_accuracy_mean", "pope_f1_score", "mmbench_accuracy"}
    | {"mme_perception_share"}
)
"""Metrics that are fractions and are shown in %."""
NORMAL_QUANTILE = 1.959963984540054
"""Half the width of a 95 % interval in standard errors: the 97.5 % quantile of the standard normal
distribution. A constant, so that no report has to import scipy for it."""
HARNESS_LIBRARIES = {"lm_eval": "lm-eval", "lmms_eval": "lmms-eval", "images": "slimbench"}
"""The library whose version is part of the identity, by harness."""
MAX_NAMED = 3
"""Tasks or files that a heading names."""


def metric_scale(metric: str) -> tuple[float, int]:
    """Return the factor and the number of decimals with which a metric is shown."""
    return (100.0, 1) if metric in PERCENT_METRICS else (1.0, 2)


def metric_identity(record: Record, metric: Metric) -> dict[str, object]:
    """Return everything that two comparable numbers must share, under the names users know."""
    harness = str(record.config["benchmark"].get("harness"))
    library = HARNESS_LIBRARIES.get(harness, harness)
    source = record.provenance.get("data", {}).get(metric.task) or {}
    return {
        "metric": metric.metric,
        "filter": metric.filter,
        "shots": metric.shots,
        "split": metric.split,
        "task version": metric.task_version,
        # A harness changes prompts and scoring between releases without a new task version.
        "harness": f"{library} {record.environment.get('versions', {}).get(library)}",
        "data fingerprint": source.get("fingerprint"),
        # Numbers over different shares of the same samples are different numbers.
        "samples": f"{metric.n} of {metric.n + metric.missing}" if metric.missing else metric.n,
    }


def model_text(record: Record) -> str:
    """Return the model's name; for a local folder, the folder's name as well."""
    path = record.config.get("model", {}).get("path")
    return f"{record.model.name} ({PurePath(path).name})" if path else record.model.name


def answered_text(metric: Metric) -> str:
    """Return how many samples a number is over, if some have no answer; else nothing."""
    return f" (n {metric.n}, {metric.missing} missing)" if metric.missing else ""


def benchmark_text(record: Record) -> str:
    """Return the benchmark with all that tells two evaluations by it apart.

    Embedded data and local files are named, since a benchmark's name is that of the real data; so
    are shots and the limit.
    """
    benchmark = record.config["benchmark"]
    unasked = {AVERAGE, *benchmark.get("perplexity", {})}
    shots = sorted({m.shots for m in record.metrics if m.headline and m.task not in unasked})
    parts = list(_origins(record))
    if shots and benchmark.get("harness") != "images":
        parts.append(" and ".join(f"{count}-shot" for count in shots))
    if benchmark.get("limit") is not None:
        parts.append(f"limit {benchmark['limit']}")
    return f"{benchmark['name']} ({', '.join(parts)})" if parts else str(benchmark["name"])


def scored_text(record: Record) -> str:
    """Return model and benchmark as the heading of their numbers."""
    return f"{model_text(record)} on {benchmark_text(record)}"


def data_text(record: Record, task: str) -> str | None:
    """Return what a task was scored on if that is not the real data set, else None."""
    source = record.provenance.get("data", {}).get(task) or {}
    if source.get("origin") == "embedded":
        return f"embedded {source['location']}"
    return PurePath(source["location"]).name if source.get("origin") == "file" else None


def _origins(record: Record) -> Iterator[str]:
    """Yield what tells the data of a run from the real data sets."""
    data = record.provenance.get("data", {})
    embedded = [task for task, source in data.items() if source.get("origin") == "embedded"]
    files = [task for task, source in data.items() if source.get("origin") == "file"]
    if embedded:
        # With few others it is clearer to name the tasks.
        yield "embedded data" if len(embedded) == len(data) else f"embedded: {_listed(embedded)}"
    if files:
        named = [f"{task} from {data_text(record, task)}" for task in files]
        yield _listed(named)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def effect_text(methods: Sequence[AppliedMethod]) -> str:
    """Return what was done to the weights, such as `removed+quantized`; empty if nothing was."""
    effects = dict.fromkeys(method.confirmed_effect for method in methods)
    return "+".join(effect for effect in effects if effect != "none")
