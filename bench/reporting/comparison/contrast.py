"""One metric of a candidate against the baseline's: scores paired by unit, bootstrap, tests.

Shapes: N units, S strata, R resamples; the two runs are columns, the baseline first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd

from bench.records import Metric
from bench.reporting.comparison.metric_forms import UnitScores
from bench.reporting.statistics import (
    LEVEL,
    Floats,
    bootstrap_p,
    detectable_difference,
    least_p,
    mcnemar,
    min_significant_flips,
    percentile_interval,
    resampled_means,
)


@dataclass(frozen=True)
class Contrast:
    """One metric of two runs; a field that was not computed is None, and `note` gives the reason.

    `low` and `high` are the 95 % interval of the difference. `p` is from the exact McNemar test if
    units are either right or wrong, else from the bootstrap; `p_holm` is corrected over its family:
    all tasks of all candidates, or all candidates' averages. `detectable` is the difference that
    `n` units detect with 80 % power. `retention` is the candidate's percentage of the baseline.
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

    @property
    def better(self) -> bool:
        """Whether the candidate is better than the baseline."""
        return (self.difference > 0) == self.higher_is_better


@dataclass(frozen=True)
class PairedScores:
    """One metric of a baseline and a candidate.

    `draws` [R, 2] are the metric's values over resamples. `gained` and `lost` are the numbers of
    units that only the candidate or only the baseline has right; None if units are not simply right
    or wrong. `units` is the number of resampled units, `differing` that of units with different
    scores, `left_out` that of units which only one of the two answered.
    """

    baseline: float
    candidate: float
    draws: Floats
    units: int
    differing: int
    gained: int | None = None
    lost: int | None = None
    left_out: int = 0

    @property
    def difference(self) -> float:
        """Candidate minus baseline."""
        return self.candidate - self.baseline

    @property
    def differences(self) -> Floats:
        """The difference in every resample, [R]."""
        difference_R: Floats = self.draws[:, 1] - self.draws[:, 0]
        return difference_R


def paired_contrast(run: str, metric: Metric, paired: PairedScores) -> Contrast:
    """Return interval, test, detectable difference and retention of one metric's pairs."""
    low, high = percentile_interval(paired.differences)
    # The spread of a statistic over bootstrap resamples estimates its standard error.
    error = float(paired.differences.std(ddof=1))
    retained, retained_low, retained_high = _retention(paired, metric.higher_is_better)
    if paired.gained is not None and paired.lost is not None:
        tested = mcnemar(paired.gained, paired.lost)
        # The normal approximation may promise more than the exact test can show: with fewer flips
        # than this no p-value reaches the level, so the larger bound is used.
        p, mid = tested.exact, tested.mid
        least = min_significant_flips() / paired.units
    else:
        # Equal pairs are no evidence, and a task with one question does not vary over resamples.
        floor = least_p(paired.differing)
        p, mid, least = max(bootstrap_p(paired.differences), floor), None, 0.0
    return replace(
        _side_by_side(run, metric, paired.units, paired.baseline, paired.candidate),
        low=low,
        high=high,
        test="bootstrap" if paired.gained is None else "mcnemar",
        gained=paired.gained,
        lost=paired.lost,
        p=p,
        p_mid=mid,
        # 0 if the two runs never differ: then the power of the test is unknown. If there are too
        # few units for a p-value below the level, no difference is detectable.
        detectable=(
            max(detectable_difference(error), least) or None
            if least_p(paired.units) <= LEVEL
            else None
        ),
        retention=retained,
        retention_low=retained_low,
        retention_high=retained_high,
        note=(
            f"paired over the {paired.units} samples that both runs answered"
            if paired.left_out or metric.missing
            else None
        ),
    )


def unpaired_contrast(run: str, metric: Metric, baseline: float, candidate: float) -> Contrast:
    """Contrast two numbers that the samples do not reproduce, without interval and test."""
    return replace(
        _side_by_side(run, metric, metric.n, baseline, candidate),
        note="the recorded samples do not reproduce this number, so there is no paired test",
    )


def _side_by_side(run: str, metric: Metric, n: int, baseline: float, candidate: float) -> Contrast:
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
    paired: PairedScores, higher_is_better: bool
) -> tuple[float, float, float] | tuple[None, None, None]:
    """Return the candidate's percentage of the baseline, with its interval.

    If lower is better the ratio is inverted, so that less than 100 is always a loss.
    """
    base_R, candidate_R = paired.draws.T
    over, under = paired.candidate, paired.baseline
    if not higher_is_better:
        base_R, candidate_R, over, under = candidate_R, base_R, under, over
    # A ratio to zero is undefined, and a ratio to values of different signs is meaningless.
    if under <= 0 or (base_R <= 0).any():
        return None, None, None
    low, high = percentile_interval(100 * candidate_R / base_R)
    return 100 * over / under, low, high


def pair_scores(
    baseline: UnitScores, candidate: UnitScores, generator: np.random.Generator
) -> PairedScores:
    """Pair two runs by unit and resample each stratum independently.

    Both runs must have scored the same documents, see `sample_mismatch`; units that only one of
    them answered are left out.
    """
    both = baseline.units.merge(candidate.units, on=["unit", "stratum"], validate="1:1")
    left_out = len(baseline.units) + len(candidate.units) - 2 * len(both)
    baseline = _restricted(baseline, both, "score_x")
    candidate = _restricted(candidate, both, "score_y")
    drawn = [
        # Resampling within a stratum keeps its size, as in the metric's definition: POPE's splits
        # and MME's categories have a fixed number of questions.
        resampled_means(group[["score_x", "score_y"]].to_numpy(), generator)
        for _, group in both.groupby("stratum")
    ]
    means_R2S = np.stack(drawn, axis=-1)
    draws_R2 = np.stack(
        [baseline.value(means_R2S[:, 0]), candidate.value(means_R2S[:, 1])], axis=-1
    )
    gained = lost = None
    if baseline.binary and candidate.binary:
        gained = int((both["score_x"] < both["score_y"]).sum())
        lost = int((both["score_x"] > both["score_y"]).sum())
    return PairedScores(
        baseline.observed,
        candidate.observed,
        draws_R2,
        len(both),
        int((both["score_x"] != both["score_y"]).sum()),
        gained,
        lost,
        left_out,
    )


def _restricted(scores: UnitScores, both: pd.DataFrame, column: str) -> UnitScores:
    kept = both[["unit", "stratum", column]].rename(columns={column: "score"})
    return replace(scores, units=kept)


def mean_of_pairs(parts: list[PairedScores]) -> PairedScores:
    """Return the unweighted mean of several metrics, each resampled independently."""
    return PairedScores(
        baseline=float(np.mean([part.baseline for part in parts])),
        candidate=float(np.mean([part.candidate for part in parts])),
        # The draws of the tasks are independent, so their mean per draw has the distribution of the
        # mean.
        draws=np.mean([part.draws for part in parts], axis=0),
        units=sum(part.units for part in parts),
        differing=sum(part.differing for part in parts),
        left_out=sum(part.left_out for part in parts),
    )
