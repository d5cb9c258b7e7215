"""Whether the same model, measured as if it were a method, comes out as fast as itself.

`bench run costs=paper` times a copy of the dense network beside the dense network, as it times a
compressed one, ten times over. The ratio must be near 1 and its interval must cover 1 in nine of
ten, or no ratio that this suite prints can be trusted to a few per cent.
"""

from __future__ import annotations

from bench.compose import run_config
from bench.device import use_threads
from bench.measurement.config import TimingConfig
from bench.measurement.gains import rows
from bench.measurement.subject import Subject
from bench.measurement.workload import Workload, workloads
from bench.models import loading
from tests.performance.figure import Figure

RUNS, GOOD = 10, 9
NEAR = 0.03
TIMING = TimingConfig(lengths=(256,), new_tokens=16)
STAGES = ("prefill", "decode", "end to end")


def figures() -> list[Figure]:
    """Measure micro_moe against its own copy on one thread."""
    use_threads(1)
    config = run_config(["model=micro_moe", "tracker=none"])
    dense = loading.load(loading.resolve(config.model, offline=True))
    (work,) = workloads(dense, TIMING)
    assert isinstance(work, Workload)
    found = []
    for _ in range(RUNS):
        measured = list(rows(Subject(dense.copy(), dense), work, TIMING, None))
        found.append({row.scope: row for row in measured if row.quantity == "speedup"})
    return [_figure(stage, [run[f"{stage} {work.shape}"] for run in found]) for stage in STAGES]


def _figure(stage: str, speedups: list) -> Figure:
    """Count the runs whose ratio is near 1 and whose interval covers it."""
    good = [
        cost
        for cost in speedups
        if abs(cost.value - 1) <= NEAR and cost.parts["low"] <= 1 <= cost.parts["high"]
    ]
    marked = sum(cost.note is not None for cost in speedups)
    values = ", ".join(f"{cost.value:.3f}" for cost in speedups)
    how = f"dense/dense within {NEAR:.0%} and covered: {values}; {marked} marked as loaded"
    name = f"runs of {RUNS} in which the same model is as fast ({stage})"
    return Figure(name, len(good), f">= {GOOD}", len(good) >= GOOD, how)
