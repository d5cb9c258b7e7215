"""Whether the same model, measured as if it were a method, comes out as fast as itself.

What a run gets to change is timed, unchanged, beside the dense network as `bench run costs=paper`
times a compressed one, at the same shapes and by the same rules, ten times over. The ratio must be
near 1 and its interval must cover 1 in nine of ten, or no ratio that this suite prints can be
trusted to a few per cent.
"""

from __future__ import annotations

from bench.config.composition import compose_run_config
from bench.device.devices import set_threads
from bench.measurement.quantities import MeasuredPair
from bench.measurement.speedup import speedup_costs
from bench.measurement.workload import Workload, workloads
from bench.models import source as model_source
from bench.records.record import Cost
from bench.runner.session import BaseModelCache
from tests.performance.figure import Figure

RUNS, GOOD = 10, 9
NEAR = 0.03


def figures() -> list[Figure]:
    """Measure micro_moe against its own copy on one thread."""
    set_threads(1)
    config = compose_run_config(["model=micro_moe", "costs=paper", "tracker=none"])
    source = model_source.resolve_model(config.model, offline=True)
    pristine, timing = BaseModelCache(), config.costs.timing
    dense = pristine.acquire(source, will_change=False)
    (work,) = workloads(dense, timing)
    assert isinstance(work, Workload)
    found: dict[str, list[Cost]] = {}
    for _ in range(RUNS):
        copy = pristine.acquire(source, will_change=True)
        for row in speedup_costs(MeasuredPair(copy, pristine.peek(source)), work, timing, None):
            if row.quantity == "speedup":
                assert isinstance(row, Cost)
                found.setdefault(row.scope, []).append(row)
    return [_figure(scope, speedups) for scope, speedups in found.items()]


def _figure(scope: str, speedups: list[Cost]) -> Figure:
    """Count the runs whose ratio is near 1 and whose interval covers it."""
    good = [
        cost
        for cost in speedups
        if abs(cost.value - 1) <= NEAR and cost.parts["low"] <= 1 <= cost.parts["high"]
    ]
    marked = sum(cost.note is not None for cost in speedups)
    values = ", ".join(f"{cost.value:.3f}" for cost in speedups)
    how = f"dense/dense within {NEAR:.0%} and covered: {values}; {marked} marked"
    name = f"runs of {RUNS} in which the same model is as fast ({scope})"
    return Figure(name, len(good), f">= {GOOD}", len(good) >= GOOD, how)
