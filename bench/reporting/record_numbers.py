"""Rules for reading the numbers of a record, shared by all reports.

They say how a metric is shown, when two metrics are the same number, which of several costs of one
quantity is the headline, and what the methods did to the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.records import AppliedMethod, Cost, Metric, Record

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
        # Numbers over different shares of the same samples are different numbers.
        "samples": f"{metric.n} of {metric.n + metric.missing}" if metric.missing else metric.n,
    }


def answered_text(metric: Metric) -> str:
    """Return how many samples a number is over, if some have no answer; else nothing."""
    return f" (n {metric.n}, {metric.missing} missing)" if metric.missing else ""


def headline_costs(record: Record) -> list[Cost]:
    """Return one cost per scope and quantity: the counted or measured one before the analytic."""
    found: dict[tuple[str, str], Cost] = {}
    for cost in record.costs:
        known = found.get((cost.scope, cost.quantity))
        # A formula only knows the changes that this repository makes to a network; a count sees
        # those of any method. An analytic value must never replace it, whatever their order.
        if known is None or (known.how == "analytic" and cost.how != "analytic"):
            found[cost.scope, cost.quantity] = cost
    return list(found.values())


def headline_cost(record: Record, quantity: str, scope: str = "model") -> Cost | None:
    """Return the headline cost of a quantity, or None if it was not obtained."""
    costs = (c for c in headline_costs(record) if (c.scope, c.quantity) == (scope, quantity))
    return next(costs, None)


def effect_text(methods: Sequence[AppliedMethod]) -> str:
    """Return what was done to the weights, such as `removed+quantized`; empty if nothing was."""
    return "+".join(dict.fromkeys(m.effect for m in methods if m.effect != "none"))
