"""Application of a run's methods to its model, in order."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import UserError

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


def refuse_impossible_order(config: RunConfig, found: Collection[str]) -> None:
    """Raise if a method cannot change weights in the form in which an earlier one leaves them.

    `found` are the forms of the model's own weights besides the published one.
    """
    # By form, the method that made it; None for the model's own.
    made_by: dict[str, str | None] = dict.fromkeys(found)
    for name, method in config.method.items():
        for form, maker in made_by.items():
            if form in method.accepts:
                continue
            words = FORM_WORDS[form]
            if maker is None:
                raise UserError(
                    f"method={name} cannot change the weights of model={config.model.name}, which "
                    f"are {words}: take the model from which they were made"
                )
            earlier = config.method[maker]
            other_way = method.leaves is None or method.leaves in earlier.accepts
            cure = (
                f"list {name} before {maker}" if other_way else f"use {name} or {maker}, not both"
            )
            raise UserError(
                f"method=[{','.join(config.method)}]: {maker} leaves weights that are {words}, "
                f"which {name} cannot change: {cure}"
            )
        if method.leaves is not None:
            made_by[method.leaves] = name


FORM_WORDS = {
    "plain": "as published",
    "ragged": "experts of different widths",
    "packed": "quantized already",
    "shared_base": "differences from a shared base",
}


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
