"""One number of a candidate beside the baseline's, with what can be said about the difference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from bench.records import MetricPart
from bench.reporting.comparison.pairing import Paired
from bench.reporting.statistics import (
    bootstrap_p,
    detectable,
    fewest_flips,
    mcnemar,
    percentile_interval,
)


@dataclass(frozen=True)
class Contrast:
    """One metric of two runs; what was not computed is None, and `note` then says why.

    `low` and `high` bound the difference at 95 %. `p` is the exact McNemar test's where units are
    right or wrong, else the bootstrap's; `p_holm` is corrected over its family: all tasks of all
    candidates, or all candidates' averages. `detectable` is the difference that so many units find
    in four cases of five. `retention` is the share in % of the baseline that is left.
    """

    run: str
    task: str
    metric: str
    filter: str
    higher_is_better: bool
    n: int
    baseline: float
    candidate: float
    difference: float
    low: float | None = None
    high: float | None = None
    test: Literal["mcnemar", "bootstrap"] | None = None
    gained: int | None = None
    lost: int | None = None
    p: float | None = None
    p_mid: float | None = None
    p_holm: float | None = None
    detectable: float | None = None
    retention: float | None = None
    retention_low: float | None = None
    retention_high: float | None = None
    note: str | None = None


def contrast(run: str, metric: MetricPart, paired: Paired) -> Contrast:
    """Say what the pairs of one metric show."""
    low, high = percentile_interval(paired.differences)
    error = float(paired.differences.std(ddof=1))
    retained, retained_low, retained_high = _retention(paired, metric.higher_is_better)
    if paired.gained is not None and paired.lost is not None:
        tested = mcnemar(paired.gained, paired.lost)
        p, mid, visible = tested.exact, tested.mid, fewest_flips() / paired.units
    else:
        p, mid, visible = bootstrap_p(paired.differences), None, 0.0
    return replace(
        _side_by_side(run, metric, paired.units, paired.baseline, paired.candidate),
        low=low,
        high=high,
        test="bootstrap" if paired.gained is None else "mcnemar",
        gained=paired.gained,
        lost=paired.lost,
        p=p,
        p_mid=mid,
        detectable=max(detectable(error), visible) or None,
        retention=retained,
        retention_low=retained_low,
        retention_high=retained_high,
    )


def unpaired(run: str, metric: MetricPart, baseline: float, candidate: float) -> Contrast:
    """Put two numbers side by side whose samples do not give them again."""
    return replace(
        _side_by_side(run, metric, metric.n, baseline, candidate),
        note="the samples on record do not give this number again, so nothing can be paired",
    )


def _side_by_side(
    run: str, metric: MetricPart, n: int, baseline: float, candidate: float
) -> Contrast:
    return Contrast(
        run=run,
        task=metric.task,
        metric=metric.metric,
        filter=metric.filter,
        higher_is_better=metric.higher_is_better,
        n=n,
        baseline=baseline,
        candidate=candidate,
        difference=candidate - baseline,
    )


def _retention(
    paired: Paired, higher_is_better: bool
) -> tuple[float, float, float] | tuple[None, None, None]:
    """Return what is left of the baseline in %, with its interval; of a loss, the inverse.

    A ratio to something that may be zero says nothing.
    """
    first_R, second_R = paired.draws.T
    over, under = (paired.candidate, paired.baseline)
    if not higher_is_better:
        first_R, second_R, over, under = second_R, first_R, under, over
    if under <= 0 or (first_R <= 0).any():
        return None, None, None
    low, high = percentile_interval(100 * second_R / first_R)
    return 100 * over / under, low, high
