"""Scores of two runs paired by unit, and their bootstrap.

Shapes: N units, S strata, R resamples; the two runs are columns, the baseline first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.reporting.comparison.scores import Scores
from bench.reporting.statistics import resampled_means
from bench.reporting.statistics.resampling import Floats


@dataclass(frozen=True)
class Paired:
    """One metric of a baseline and a candidate.

    `draws` [R, 2] holds the metric's values over resamples. `gained` and `lost` count the units
    that only one of the two has right; None if units are not simply right or wrong. `units` counts
    the resampled units.
    """

    baseline: float
    candidate: float
    draws: Floats
    units: int
    gained: int | None = None
    lost: int | None = None

    @property
    def difference(self) -> float:
        """Candidate minus baseline."""
        return self.candidate - self.baseline

    @property
    def differences(self) -> Floats:
        """The difference in every resample, [R]."""
        difference_R: Floats = self.draws[:, 1] - self.draws[:, 0]
        return difference_R


def pair(baseline: Scores, candidate: Scores, generator: np.random.Generator) -> Paired:
    """Pair two runs by unit and resample each stratum independently."""
    both = baseline.units.merge(candidate.units, on=["unit", "stratum"], validate="1:1")
    # `unlike_samples` has made sure that both runs scored the same documents.
    assert len(both) == len(baseline.units) == len(candidate.units)
    drawn = [
        # Resampling within a stratum keeps its size, as the metric's definition does: POPE's splits
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
    return Paired(baseline.observed, candidate.observed, draws_R2, len(both), gained, lost)


def mean_of(parts: list[Paired]) -> Paired:
    """Return the unweighted mean of several metrics, each resampled independently."""
    return Paired(
        baseline=float(np.mean([part.baseline for part in parts])),
        candidate=float(np.mean([part.candidate for part in parts])),
        # The draws of the tasks are independent, so averaging them draw by draw gives the
        # distribution of the mean.
        draws=np.mean([part.draws for part in parts], axis=0),
        units=sum(part.units for part in parts),
    )
