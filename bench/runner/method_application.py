"""Apply the methods of a run to its model, in order, and check the effects that they report.

The suite counts the weights, bytes and FLOPs of the network before and after each method. An effect
that contradicts these counts is not claimed in any report.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.errors import UserError, class_line, source_line
from bench.runner.session import shared_state_kept
from bench.ui import format_quantity

if TYPE_CHECKING:
    import torch

    from bench.config.run_config import RunConfig
    from bench.method import Context, Method, MethodReport
    from bench.models.model import Model
    from bench.models.structure.model_structure import ModelStructure
    from bench.records import AppliedMethod, EffectCheck, SizeAndWork
    from bench.records.record import JsonObject
    from bench.runner.session import Session
    from bench.ui import Progress


def apply_methods(
    config: RunConfig,
    model: Model,
    context: Context,
    session: Session,
    unchanged: Model | None = None,
) -> list[AppliedMethod]:
    """Apply a run's methods to its model in order and return their checked reports.

    `unchanged` is the original model if the session holds it; it is then counted after the first
    method, because only then is the result needed. Otherwise `model` is counted before it changes.

    Raises:
        UserError: a method produced NaN or infinite weights, or reports an unknown effect.
    """
    from bench.measurement.costs import count_size_and_work
    from bench.records.record import lost_zeros

    if not config.method:
        return []
    # The unchanged model is counted once for all runs of a session.
    described = repr(getattr(model.network, "config", None))
    key = (model.fingerprint, described, model.config, config.costs)
    counts, before = session.dense_counts, session.dense_counts.get(key)
    if before is None and unchanged is None:
        before = counts[key] = count_size_and_work(model, config.costs)
    applied: list[AppliedMethod] = []
    with_memory = "memory" in config.costs.measure
    for name, method in config.method.items():
        # Separate folders, so that methods do not find each other's checkpoints.
        folder = context.folder / name if context.folder else None
        done = _apply_guarded(
            name, method, model, replace(context, folder=folder), memory=with_memory
        )
        if before is None:
            assert unchanged is not None
            before = counts[key] = count_size_and_work(unchanged, config.costs)
        after = count_size_and_work(model, config.costs)
        check = check_effect(done.effect, before, after)
        if (doubt := check.refutation or _idle_reason(check, done)) is not None:
            context.progress.warn(f"{name} {doubt}")
        before = after
        applied.append(done.model_copy(update={"check": check}))
    for lost in lost_zeros(applied).values():
        context.progress.warn(lost)
    return applied


def _apply_guarded(
    name: str, method: Method, model: Model, context: Context, *, memory: bool
) -> AppliedMethod:
    """Apply one method; return its report with its seconds and, with `memory`, its peak bytes.

    What it must not change is put back or refused. The reported effect is not checked yet.

    Raises:
        UserError: the method produced NaN or infinite weights or dtypes that do not fit together,
            did not return a report, or changed what other runs of this process share.
    """
    from bench.device.devices import synchronize
    from bench.device.memory import PeakMemory
    from bench.models.hashing import refuse_not_finite

    monitor = PeakMemory(model.device) if memory else nullcontext()
    knobs = method.model_dump(mode="json")
    dtypes = _dtypes(model)
    with (
        _leak_reported(name, model, context.progress),
        context.progress.phase(f"applying {name}"),
        shared_state_kept(model.network, name),
        _attribute_errors(name, method),
        # What a method prints is none of a command's results, which may be JSON.
        redirect_stdout(sys.stderr),
    ):
        with monitor as peak:
            start = time.perf_counter()
            report = method.apply(model, context)
            _refuse_wrong_report(name, method, report)
            synchronize(model.device)
            seconds = time.perf_counter() - start
        # A method that replaces modules may not invalidate the cached structure, which would then
        # refer to modules that have been replaced.
        model.invalidate_structure()
        refuse_not_finite(model.network, name)
        _refuse_unmatched_dtypes(name, model, dtypes)
        _refuse_changed_knobs(name, method, knobs)
    applied = _recordable(name, method, knobs, report)
    return applied.model_copy(
        update={"seconds": seconds, "peak_bytes": peak.above if peak else None}
    )


@contextmanager
def _leak_reported(name: str, model: Model, progress: Progress) -> Iterator[None]:
    """Warn if the method applied in the `with` block keeps memory that is not the model's."""
    from bench.device.devices import LeakMonitor

    leaks = LeakMonitor(model.network, model.device)
    yield
    if leaked := leaks.leaked_bytes(model.network):
        progress.warn(
            f"{name} leaks {leaked / 2**20:.0f} MiB in addition to the model's own memory: a long "
            "sweep will run out of memory"
        )


def refuse_idle(name: str, method: Method, structure: ModelStructure) -> None:
    """Raise if a method has a ratio above 0 that rounds down to removing nothing.

    Otherwise the dense model would be recorded under the method's name. A ratio of 0, which is
    often the first value of a sweep, is accepted.
    """
    ratio = getattr(method, "ratio", None)
    planned = method.planned_removals(structure) if ratio else None
    if planned is not None and not any(planned):
        raise UserError(
            f"method.{name}.ratio={ratio:g} rounds down to nothing in every part of "
            f"{structure.architecture}: raise it, or set it to 0 to leave the model unchanged"
        )


SHOWN_BY = {
    "removed": ("parameters", "bytes"),
    "quantized": ("bytes",),
    "skipped": ("FLOPs",),
    "zeroed": ("nonzero parameters",),
}
"""Effects, and the counts that must decrease for each of them."""


def check_effect(effect: str, before: SizeAndWork, after: SizeAndWork) -> EffectCheck:
    """Compare the effect that a method reports with the counts before and after it.

    `removed` requires fewer weights and fewer bytes; `quantized` more packed weights, or fewer
    bytes for the same weights; `skipped` fewer FLOPs. The other effects require that no count
    decreases, and `zeroed` also that more weights are zero. Weights are counted in parameters and
    buffers, without padding.
    """
    from bench.records import EffectCheck

    fewer_bytes = after.bytes < before.bytes
    fewer_weights = after.numbers < before.numbers
    shown = {
        # Fewer bytes prove quantization only if no weights were removed, as in packing with 0 bits.
        "quantized": after.packed > before.packed or (fewer_bytes and not fewer_weights),
        "removed": fewer_weights and fewer_bytes,
        "skipped": _fell(before.flops, after.flops),
    }
    found = next((name for name, is_shown in shown.items() if is_shown), "none")
    stands = shown.get(effect, found == "none")
    if effect == "zeroed":
        stands = stands and _fell(before.nonzero, after.nonzero)
    refutation = None if stands else _refutation(effect, found, before, after)
    return EffectCheck(found=found, before=before, after=after, refutation=refutation)


def _fell(before: float | None, after: float | None) -> bool:
    # None is a count that could not be made.
    return before is not None and after is not None and after < before


def _refutation(effect: str, found: str, before: SizeAndWork, after: SizeAndWork) -> str:
    """Return a sentence about the counts that contradict the reported effect."""
    if effect == "skipped" and (reason := before.reason or after.reason):
        return f"reports skipped computation, which cannot be confirmed: {reason}"
    if effect == "zeroed" and found == "none" and None in (before.nonzero, after.nonzero):
        return "reports zeroed weights, which cannot be confirmed: they are offloaded"
    counts = {
        # As in `check_effect`, parameters and buffers.
        "parameters": (before.numbers, after.numbers),
        "bytes": (before.bytes, after.bytes),
        "FLOPs": (before.flops, after.flops),
        "nonzero parameters": (before.nonzero, after.nonzero),
    }
    shown = "do not show it" if found == "none" else f"show {found}"
    parts = [
        f"{name} {format_quantity(counts[name][0])} before and {format_quantity(counts[name][1])} "
        "after"
        for name in dict.fromkeys(SHOWN_BY.get(effect, ()) + SHOWN_BY.get(found, ()))
    ]
    cure = _TRUE_EFFECTS.get(effect, "") if found == "none" else ""
    return f"reports the effect {effect}, but the counts {shown}: {', '.join(parts)}{cure}"


_TRUE_EFFECTS = {
    "quantized": "; weights that are rounded but not packed have the effect none",
    "removed": "; weights that are zero but still stored have the effect zeroed",
}
"""Hints by reported effect, for the author of a method that saves nothing."""


def _idle_reason(check: EffectCheck, method: AppliedMethod) -> str | None:
    """Return a warning about a method with a ratio above 0 that saved nothing, or None."""
    ratio = method.config.get("ratio")
    idle = method.effect == "none" and check.found == "none" and not method.trained
    # "saved", not "changed": only the counts are known to be equal.
    return f"saved nothing, although ratio={ratio}" if idle and ratio else None


def refuse_impossible_order(config: RunConfig, forms: Collection[str]) -> None:
    """Raise if a method cannot change weights in the form that an earlier method leaves.

    Also raise if a method draws new weights, which would discard the work of earlier methods.
    `forms` are the forms of the model's own weights other than `plain`.
    """
    # The method that made each form; None for forms of the model itself.
    made_by: dict[str, str | None] = dict.fromkeys(forms)
    names = list(config.method)
    for name, method in config.method.items():
        if method.restarts and name != names[0]:
            lost = " and ".join(names[: names.index(name)])
            raise UserError(
                f"method=[{','.join(names)}]: {name} draws fresh weights, which discards the "
                f"result of {lost}: set method.{name}.restart=false, or leave {lost} out"
            )
        for form, maker in made_by.items():
            if form in method.accepts:
                continue
            words = FORM_WORDS[form]
            if maker is None:
                raise UserError(
                    f"method={name} cannot change the weights of model={config.model.name}, which "
                    f"are {words}: choose the model from which they were made"
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
    "novices": "constants in place of experts",
    "prequantized": "quantized in the checkpoint",
}


def _refuse_wrong_report(name: str, method: Method, report: object) -> None:
    """Raise unless a method's `apply` returned a report."""
    from bench.method import MethodReport

    place = f"method {name}: {class_line(type(method))}"
    if not isinstance(report, MethodReport):
        raise UserError(
            f"{place}.apply returned {type(report).__name__} instead of a MethodReport: end it "
            'with return MethodReport("removed"), or another effect'
        )


def _recordable(
    name: str, method: Method, knobs: JsonObject, report: MethodReport
) -> AppliedMethod:
    """Return a method's entry in the record, still without time and memory.

    A record is written after the scoring, so what could not be written or read again is refused
    here, before it.

    Raises:
        UserError: the report has values that a record cannot hold.
    """
    from pydantic import ValidationError

    from bench.records import AppliedMethod
    from bench.records.json_values import parse_json
    from bench.records.leaves import first_fault

    try:
        # pydantic would store NaN as null, which is not what the method reports.
        json.dumps(report.details, allow_nan=False)
        applied = AppliedMethod(
            name=name,
            config=knobs,
            effect=report.effect,
            report=report.details,
            layers=tuple(report.layers),
            seconds=0.0,
            trained=report.trained,
        )
        text = applied.model_dump_json()
        # As deep as in a record, whose depth is limited.
        parse_json(f'{{"methods": [{text}]}}'.encode())
        AppliedMethod.model_validate_json(text, strict=True)
    except (TypeError, ValueError) as error:
        reason = first_fault(error) if isinstance(error, ValidationError) else str(error)
        raise UserError(
            f"method {name}: {class_line(type(method))}.apply reports values that a record cannot "
            f"hold ({reason}): use numbers, strings and lists, and LayerReport for layers"
        ) from None
    return applied


def _refuse_unmatched_dtypes(name: str, model: Model, before: dict[str, torch.dtype]) -> None:
    """Raise if a method gave weights another dtype, with which the network cannot compute."""
    from bench.measurement.flops.cost_rows import dtype_fault

    now = _dtypes(model)
    changed = [weight for weight in now if before.get(weight, now[weight]) != now[weight]]
    # Packed weights and whole networks of another dtype are fine, so the network is tried.
    if changed and (reason := dtype_fault(model)) is not None:
        weight = changed[0]
        raise UserError(
            f"method {name} left {weight} in {now[weight]}, which was in {before[weight]}, and the "
            f"network cannot compute with both ({reason}): convert it back before apply returns"
        )


def _dtypes(model: Model) -> dict[str, torch.dtype]:
    return {name: weight.dtype for name, weight in model.network.named_parameters()}


def _refuse_changed_knobs(name: str, method: Method, before: JsonObject) -> None:
    """Raise if a method changed its knobs, which the run's id and its labels hold as given."""
    now = method.model_dump(mode="json")
    for knob in before:
        if now.get(knob) != before[knob]:
            raise UserError(
                f"method {name}: {class_line(type(method))}.apply changes its knob {knob} from "
                f"{before[knob]} to {now.get(knob)}: keep what it computes in a variable"
            )


@contextmanager
def later_errors_attributed(methods: Mapping[str, Method]) -> Iterator[None]:
    """Add the line of a method's code to an error that it raises after it was applied.

    The network calls such code while it is scored and counted.
    """
    try:
        yield
    except Exception as error:
        line = source_line(error, *map(_package, methods.values()))
        if line is not None:
            error.add_note(f"in the code of a method ({line})")
        raise


def _package(method: Method) -> str:
    return type(method).__module__.partition(".")[0]


@contextmanager
def _attribute_errors(name: str, method: Method) -> Iterator[None]:
    """Add the method's name and the line of its code to an error raised in the `with` block."""
    try:
        yield
    except Exception as error:
        # A note instead of a new exception, because callers distinguish types such as UserError.
        line = source_line(error, _package(method))
        error.add_note(f"while applying method {name}" + (f" ({line})" if line else ""))
        raise
