"""Paired comparison of runs, sample by sample."""

from bench.reporting.comparison.comparison import ComparedRun, Comparison, baseline_of, compare
from bench.reporting.comparison.contrast import Contrast
from bench.reporting.comparison.flips import Flip, find_flips

__all__ = [
    "ComparedRun",
    "Comparison",
    "Contrast",
    "Flip",
    "baseline_of",
    "compare",
    "find_flips",
]
