"""Rules for reading the numbers of a record, shared by all reports.

They say how a metric is shown, when two metrics are the same number, which of several costs of one
quantity is the headline, and what the methods did to the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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
        "samples": metric.n,
    }


def effect_text(methods: Sequence[AppliedMethod]) -> str:
    """Return what was done to the weights, such as `removed+quantized`; empty if nothing was."""
    effects = dict.fromkeys(method.confirmed_effect for method in methods)
    return "+".join(effect for effect in effects if effect != "none")
