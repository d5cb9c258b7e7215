"""Evaluation: plan a benchmark, then evaluate any number of models on it.

Importing this is light; torch and the harness are loaded by the first call.
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
