"""Paired comparison of runs, sample by sample."""

from bench.reporting.comparison.comparing import Comparison, Run, baseline_of, compare
from bench.reporting.comparison.contrast import Contrast
from bench.reporting.comparison.flips import Flip, flips

__all__ = ["Comparison", "Contrast", "Flip", "Run", "baseline_of", "compare", "flips"]
