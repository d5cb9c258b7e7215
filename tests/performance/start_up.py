"""How soon the command line answers, and how soon the evaluator knows its tasks."""

from __future__ import annotations

import subprocess
import sys
import time

from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times

HELP = [sys.executable, "-m", "bench.cli", "--help"]


def figures() -> list[Figure]:
    """`bench --help` in seconds; the restricted task index against lm-eval's full one."""
    took = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run(HELP, check=True, capture_output=True)
        took.append(time.perf_counter() - began)
    return [
        Figure("bench --help", min(took), "<= 0.4 s", min(took) <= 0.4, "fastest of 5 processes"),
        _index(),
    ]


def _index() -> Figure:
    from lm_eval.tasks import TaskManager

    from bench.evaluation import plan
    from bench.evaluation.config import BenchmarkConfig

    nine = BenchmarkConfig(name="b", suite="micro", tasks=("arc_easy", "boolq", "piqa"))
    full, ours = times([TaskManager, lambda: plan(nine, offline=True)], rounds=5)
    value = ratio(ours, full)[0]
    how = f"plan of three tasks {min(ours):.3f} s, TaskManager() {min(full):.2f} s, minima of 5"
    return Figure("task index / TaskManager()", value, "<= 0.1", value <= 0.1, how)
