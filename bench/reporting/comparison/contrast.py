"""Contrast of one number of a candidate with the baseline's: difference, interval, test, power."""

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
    """One metric of two runs; a field that was not computed is None, and `note` gives the reason.

    `low` and `high` bound the difference at 95 %. `p` is from the exact McNemar test if units are
    either right or wrong, else from the bootstrap; `p_holm` is corrected over its family: all tasks
    of all candidates, or all candidates' averages. `detectable` is the difference that `n` units
    detect with 80 % power. `retention` is the percentage of the baseline that is left.
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
    """Compute interval, test, detectable difference and retention of one metric's pairs."""
    low, high = percentile_interval(paired.differences)
    # The spread of a statistic over bootstrap resamples estimates its standard error.
    error = float(paired.differences.std(ddof=1))
    retained, retained_low, retained_high = _retention(paired, metric.higher_is_better)
    if paired.gained is not None and paired.lost is not None:
        tested = mcnemar(paired.gained, paired.lost)
        # The normal approximation can promise more than the exact test can deliver: with fewer
        # flips than this no p-value reaches the level, so the larger bound counts.
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
        # 0 if the two runs never differ: then nothing is known about what could be seen.
        detectable=max(detectable(error), visible) or None,
        retention=retained,
        retention_low=retained_low,
        retention_high=retained_high,
    )


def unpaired(run: str, metric: MetricPart, baseline: float, candidate: float) -> Contrast:
    """Contrast two numbers that the samples do not reproduce, without interval and test."""
    return replace(
        _side_by_side(run, metric, metric.n, baseline, candidate),
        note="the recorded samples do not reproduce this number, so there is no paired test",
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
    """Return the percentage of the baseline that is left, with its interval.

    If lower is better the ratio is inverted, so that less than 100 is a loss in either case.
    """
    first_R, second_R = paired.draws.T
    over, under = (paired.candidate, paired.baseline)
    if not higher_is_better:
        first_R, second_R, over, under = second_R, first_R, under, over
    # A ratio to zero is undefined, and one to a value of changing sign has no meaning.
    if under <= 0 or (first_R <= 0).any():
        return None, None, None
    low, high = percentile_interval(100 * second_R / first_R)
    return 100 * over / under, low, high
