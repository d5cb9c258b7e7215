"""Energy of a call, from a hardware counter read before and after many consecutive calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from bench.device.devices import synchronize
from bench.device.energy_counters import EnergyMeter, Unavailable, energy_meter
from bench.device.machine import MachineMonitor
from bench.measurement.quantities import END_TO_END, FORWARD, PREFILL, MeasuredPair, Measurements
from bench.measurement.workload import GenerationWorkload, Workload
from bench.records.record import Cost, MissingMeasurement

WINDOWS = 3
"""Odd, so that the median is one of them: background work disturbs at most one window."""


@torch.no_grad()
def energy_costs(subject: MeasuredPair, work: Workload, seconds: float) -> Measurements:
    """Yield the joules of one call, and those of the dense model.

    Without an energy counter a missing measurement is yielded instead.
    """
    device = subject.model.device
    try:
        counter = energy_meter(device)
    except Unavailable as reason:
        yield MissingMeasurement(scope=work.shape, quantity="energy", reason=str(reason))
        return
    inputs = work.on(device)
    forwards = [partial(work.forward, network, inputs) for network in subject.networks]
    stages: dict[str, Sequence[Callable[[], object]]] = {FORWARD: forwards}
    if isinstance(work, GenerationWorkload):
        generations = [partial(work.generate, network, inputs) for network in subject.networks]
        stages = {PREFILL: forwards, END_TO_END: generations}
    for stage, calls in stages.items():
        scope = f"{stage} {work.shape}"
        try:
            with MachineMonitor(device) as monitor:
                joules = joules_per_call(calls, counter, device, seconds)
        except Unavailable as reason:  # A counter may disappear between two readings.
            yield MissingMeasurement(scope=scope, quantity="energy", reason=str(reason))
            continue
        # What the counter covers (a GPU board, a CPU package) is always stated with the number.
        note = "; ".join(filter(None, (counter.how, monitor.reading.fault)))
        parts = {"dense": joules[1]} if subject.dense else {}
        yield Cost(
            scope=scope,
            quantity="energy",
            unit="J",
            value=joules[0],
            how="measured",
            parts=parts,
            note=note,
        )
        if subject.no_gain_reason or subject.dense:
            yield _saving(scope, joules, subject.no_gain_reason, note)


def _saving(
    scope: str, joules: Sequence[float], no_gain_reason: str | None, note: str
) -> Cost | MissingMeasurement:
    """Return the share of the dense model's joules that are saved; those are the second."""
    if no_gain_reason:
        return MissingMeasurement(scope=scope, quantity="energy_saved", reason=no_gain_reason)
    own, dense = joules
    if dense <= 0:
        # A counter with coarse steps, or one that wraps around, may not advance in a short window.
        return MissingMeasurement(
            scope=scope,
            quantity="energy_saved",
            reason="the energy counter did not advance for the dense model",
        )
    return Cost(
        scope=scope,
        quantity="energy_saved",
        unit="1",
        value=1 - own / dense,
        how="measured",
        note=note,
    )


def joules_per_call(
    calls: Sequence[Callable[[], object]], meter: EnergyMeter, device: torch.device, seconds: float
) -> list[float]:
    """Return the joules per call of each candidate: the median over interleaved windows.

    A window lasts at least `seconds`, because a GPU's counter advances only every tenth of a
    second.
    """
    # The first call of a network allocates and compiles, which must not be part of a window.
    for call in calls:
        call()
    # Interleaved, so that drift of the machine's temperature or load affects all candidates alike.
    joules: list[list[float]] = [[] for _ in calls]
    for _ in range(WINDOWS):
        for call, windows in zip(calls, joules, strict=True):
            windows.append(_joules_in_window(call, meter, device, seconds))
    return [statistics.median(windows) for windows in joules]


def _joules_in_window(
    call: Callable[[], object], meter: EnergyMeter, device: torch.device, seconds: float
) -> float:
    """Repeat a call for `seconds`; return the joules per call."""
    # Energy of work queued earlier must not be part of the window.
    synchronize(device)
    before, started, count = meter.joules(), time.perf_counter(), 0
    # At least one call, even if the machine is busy between the two readings of the clock.
    while not count or time.perf_counter() - started < seconds:
        call()
        # After every call, because the loop would otherwise only enqueue kernels and exceed the
        # window by the length of the queue.
        synchronize(device)
        count += 1
    return (meter.joules() - before) / count
