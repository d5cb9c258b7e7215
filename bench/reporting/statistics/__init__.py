"""Statistics of paired scores as pure functions of arrays; each names its source."""

from bench.reporting.statistics.holm import holm
from bench.reporting.statistics.intervals import bootstrap_p, percentile_interval
from bench.reporting.statistics.mcnemar import McNemar, mcnemar
from bench.reporting.statistics.power import detectable, fewest_flips
from bench.reporting.statistics.resampling import resampled_means

__all__ = [
    "McNemar",
    "bootstrap_p",
    "detectable",
    "fewest_flips",
    "holm",
    "mcnemar",
    "percentile_interval",
    "resampled_means",
]
