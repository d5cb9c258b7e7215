"""Application of a run's methods to its model, in order, and the check of what they claim.

A method reports its effect; the suite counts the network before and after it. A saving that the
counts do not show is not claimed in any report.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import UserError
from bench.ui import format_quantity

if TYPE_CHECKING:
    from bench.config.run_config import RunConfig
    from bench.method import Context, Method, MethodReport
    from bench.models.model import Model
    from bench.models.structure.model_structure import ModelStructure
    from bench.records import AppliedMethod, EffectCheck, SizeAndWork
    from bench.records.record import JsonObject
    from bench.runner.session import Session


def apply_methods(
    config: RunConfig, model: Model, context: Context, session: Session
) -> list[AppliedMethod]:
    """Apply a run's methods to its model in order and return their checked reports.

    Raises:
        UserError: a method left NaN or infinite weights, or reports an unknown effect.
    """
    from bench.device.devices import synchronize
    from bench.device.memory import PeakMemory
    from bench.measurement.costs import LeakMonitor, count_size_and_work
    from bench.models.hashing import refuse_not_finite
    from bench.records import AppliedMethod

    if not config.method:
        return []
    # The unchanged model is counted once for all runs of a session.
    described = repr(getattr(model.network, "config", None))
    key = (model.fingerprint, described, model.config, config.costs)
    if key not in session.dense_counts:
        session.dense_counts[key] = count_size_and_work(model, config.costs)
    applied, before = [], session.dense_counts[key]
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
        # A method that replaces modules may not know of the cache, and the next reader of the
        # structure (the next method, a formula) would see modules that are no longer there.
        model.invalidate_structure()
        refuse_not_finite(model.network, name)
        if leaked := leaks.leaked_bytes(model.network):
            context.progress.warn(
                f"{name} leaks {leaked / 2**20:.0f} MiB besides the model's own memory: "
                "a long sweep will run out of memory"
            )
        knobs = method.model_dump(mode="json")
        after = count_size_and_work(model, config.costs)
        check = check_effect(report.effect, before, after)
        if (doubt := check.refutation or _idle_reason(check, report, knobs)) is not None:
            context.progress.warn(f"{name} {doubt}")
        before = after
        applied.append(
            AppliedMethod(
                name=name,
                config=knobs,
                effect=report.effect,
                report=report.details,
                layers=tuple(report.layers),
                seconds=took,
                peak_bytes=peak.above if peak else None,
                check=check,
                trained=report.trained,
            )
        )
    return applied


def refuse_idle(name: str, method: Method, structure: ModelStructure) -> None:
    """Raise if a method is asked for a saving and will remove nothing; no weight is loaded yet.

    Otherwise the dense model would be recorded under the method's name.
    """
    # Zero is a request to change nothing, as a sweep's first value often is.
    ratio = getattr(method, "ratio", None)
    planned = method.planned_removals(structure) if ratio else None
    if planned is not None and not any(planned):
        raise UserError(
            f"method.{name}.ratio={ratio:g} rounds down to nothing in every part of "
            f"{structure.architecture}: raise it, or set it to 0 to change nothing on purpose"
        )


def check_effect(effect: str, before: SizeAndWork, after: SizeAndWork) -> EffectCheck:
    """Compare the effect that a method reports with the counts before and after it.

    `removed` needs fewer parameters or bytes, `quantized` fewer bytes or more packed weights,
    `skipped` fewer FLOPs. The other effects claim no saving.
    """
    from bench.records import EffectCheck

    fewer_parameters = after.parameters < before.parameters
    fewer_bytes = after.bytes < before.bytes
    # Work that could not be counted is not known to have fallen.
    counted = before.flops is not None and after.flops is not None
    shown = {
        "removed": fewer_parameters or fewer_bytes,
        "quantized": fewer_bytes or after.packed > before.packed,
        "skipped": counted and (after.flops or 0) < (before.flops or 0),
    }
    # Fewer bytes with all parameters are a storage in fewer bits, not a removal.
    signs = shown | {"removed": fewer_parameters}
    found = next((name for name, is_shown in signs.items() if is_shown), "none")
    refutation = None if shown.get(effect, True) else _refutation(effect, before, after)
    return EffectCheck(found=found, before=before, after=after, refutation=refutation)


def _refutation(effect: str, before: SizeAndWork, after: SizeAndWork) -> str:
    """Say which counts should have fallen, and did not."""
    counts = {
        "parameters": (before.parameters, after.parameters),
        "bytes": (before.bytes, after.bytes),
        "FLOPs": (before.flops, after.flops),
    }
    names = {"removed": ("parameters", "bytes"), "quantized": ("bytes",), "skipped": ("FLOPs",)}
    if effect == "skipped" and (reason := before.reason or after.reason):
        return f"reports skipped computation, which cannot be confirmed: {reason}"
    parts = [
        f"{name} {format_quantity(counts[name][0])} before and {format_quantity(counts[name][1])} "
        "after"
        for name in names[effect]
    ]
    return f"reports the effect {effect}, but the counts do not show it: {', '.join(parts)}"


def _idle_reason(check: EffectCheck, report: MethodReport, knobs: JsonObject) -> str | None:
    """Return what to say of a method that was asked for a saving and changed nothing."""
    # Zero is a request to change nothing, as a sweep's first value often is.
    ratio = knobs.get("ratio")
    idle = report.effect == "none" and check.found == "none" and not report.trained
    return f"changed nothing, although ratio={ratio}" if idle and ratio else None


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
