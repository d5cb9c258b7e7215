"""Evaluation: plan a benchmark once, then evaluate any number of models on it.

Importing this package is cheap; torch and the harnesses are imported on the first call.
"""

from bench.evaluation.benchmark import (
    PlannedBenchmark,
    evaluate,
    plan,
    plan_once,
    prefetch_benchmark,
)
from bench.evaluation.metrics import Evaluation
from bench.schema import BenchmarkConfig, PerplexityConfig

__all__ = [
    "BenchmarkConfig",
    "Evaluation",
    "PerplexityConfig",
    "PlannedBenchmark",
    "evaluate",
    "plan",
    "plan_once",
    "prefetch_benchmark",
]
