"""Application of a run's methods to its model, in order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.config.run_config import RunConfig
    from bench.method import Context
    from bench.models.model import Model
    from bench.records import AppliedMethod


def apply_methods(config: RunConfig, model: Model, context: Context) -> list[AppliedMethod]:
    """Apply a run's methods to its model in order and return their reports.

    Raises:
        UserError: a method left NaN or infinite weights.
    """
    from bench.device.devices import synchronize
    from bench.device.memory import PeakMemory
    from bench.measurement.memory import LeakMonitor
    from bench.models.hashing import refuse_not_finite
    from bench.records import AppliedMethod

    applied = []
    watched = "memory" in config.costs.measure
    for name, method in config.method.items():
        # Two methods must not find each other's checkpoints.
        method_context = replace(context, folder=context.folder / name if context.folder else None)
        leaks = LeakMonitor(model.network, model.device)
        highest = PeakMemory(model.device) if watched else nullcontext()
        with (
            context.progress.phase(f"applying {name}"),
            _attribute_errors(name),
            highest as peak,
        ):
            began = time.perf_counter()
            report = method.apply(model, method_context)
            synchronize(model.device)
            took = time.perf_counter() - began
        refuse_not_finite(model.network, name)
        if leaked := leaks.leaked_bytes(model.network):
            context.progress.warn(
                f"{name} leaks {leaked / 2**20:.0f} MiB besides the model's own memory: "
                "a long sweep will run out of memory"
            )
        knobs = method.model_dump(mode="json")
        applied.append(
            AppliedMethod(
                name=name,
                config=knobs,
                effect=report.effect,
                report=report.details,
                layers=tuple(report.layers),
                seconds=took,
                peak_bytes=peak.above if peak else None,
            )
        )
    return applied


@contextmanager
def _attribute_errors(name: str) -> Iterator[None]:
    """Add the name of the method to an error raised inside the block."""
    try:
        yield
    except Exception as error:
        # A note instead of a new exception: callers still see the type, such as out of memory or
        # UserError.
        error.add_note(f"while applying method {name}")
        raise
