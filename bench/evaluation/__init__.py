"""Evaluation: plan a benchmark once, then evaluate any number of models on it.

Importing this package is cheap; torch and the harnesses are imported on the first call.
"""

from bench.evaluation.config import BenchmarkConfig, PerplexityConfig
from bench.evaluation.planning import Plan, plan, plan_once, prefetch
from bench.evaluation.result import Evaluation, Metric
from bench.evaluation.running import evaluate

__all__ = [
    "BenchmarkConfig",
    "Evaluation",
    "Metric",
    "PerplexityConfig",
    "Plan",
    "evaluate",
    "plan",
    "plan_once",
    "prefetch",
]
