"""Evaluation: plan a benchmark once, then evaluate any number of models on it.

Importing this package is cheap; torch and the harnesses are imported on the first call.
"""

from bench.evaluation.benchmark import (
    PlanCache,
    PlannedBenchmark,
    evaluate,
    plan,
    prefetch_benchmark,
    rescore,
)
from bench.evaluation.metrics import Evaluation
from bench.schema import BenchmarkConfig, PerplexityConfig

__all__ = [
    "BenchmarkConfig",
    "Evaluation",
    "PerplexityConfig",
    "PlanCache",
    "PlannedBenchmark",
    "evaluate",
    "plan",
    "prefetch_benchmark",
    "rescore",
]
