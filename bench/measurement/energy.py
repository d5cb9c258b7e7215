"""Energy of a call, from a hardware counter read before and after many consecutive calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from bench.device import synchronize
from bench.device.energy import Meter, meter
from bench.device.machine import Watch
from bench.device.unavailable import Unavailable
from bench.measurement.cost import Cost
from bench.measurement.gap import Gap
from bench.measurement.rows import Rows
from bench.measurement.stages import FORWARD, PREFILL, WHOLE
from bench.measurement.subject import Subject
from bench.measurement.workload import Answering, Workload

WINDOWS = 3


@torch.no_grad()
def rows(subject: Subject, work: Workload, seconds: float) -> Rows:
    """Yield the joules of one call, with the dense model's next to them.

    Without an energy counter one missing measurement is yielded instead.
    """
    device = subject.model.device
    try:
        counter = meter(device)
    except Unavailable as reason:
        yield Gap(work.shape, "energy", str(reason))
        return
    inputs = work.on(device)
    forwards = [partial(work.forward, network, inputs) for network in subject.networks]
    stages: dict[str, Sequence[Callable[[], object]]] = {FORWARD: forwards}
    if isinstance(work, Answering):
        answers = [partial(work.answer, network, inputs) for network in subject.networks]
        stages = {PREFILL: forwards, WHOLE: answers}
    for stage, calls in stages.items():
        scope = f"{stage} {work.shape}"
        try:
            with Watch(device) as watch:
                spent = joules(calls, counter, device, seconds)
        except Unavailable as reason:  # a counter may vanish between two readings
            yield Gap(scope, "energy", str(reason))
            continue
        # What the counter covers (a GPU board, a CPU package) always belongs to the number.
        note = "; ".join(filter(None, (counter.how, watch.reading.fault)))
        parts = {"dense": spent[1]} if subject.dense else {}
        yield Cost(scope, "energy", "J", spent[0], "measured", parts, note)
        if subject.no_gain:
            yield Gap(scope, "energy_saved", subject.no_gain)
        elif subject.dense:
            saved = 1 - spent[0] / spent[1]
            yield Cost(scope, "energy_saved", "1", saved, "measured", note=note)


def joules(
    calls: Sequence[Callable[[], object]], meter: Meter, device: torch.device, seconds: float
) -> list[float]:
    """Return the joules per call of each candidate: the median over windows taken in turn.

    A window lasts at least `seconds`: a GPU's counter advances only every tenth of a second.
    """
    # In turn, so that drift of the machine's temperature or load affects all candidates alike.
    kept: list[list[float]] = [[] for _ in calls]
    for _ in range(WINDOWS):
        for call, found in zip(calls, kept, strict=True):
            found.append(_window(call, meter, device, seconds))
    return [statistics.median(found) for found in kept]


def _window(
    call: Callable[[], object], meter: Meter, device: torch.device, seconds: float
) -> float:
    """Repeat a call for `seconds`; return the joules per call."""
    # Energy of work queued earlier must not fall into the window.
    synchronize(device)
    before, began, count = meter.joules(), time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        call()
        # Per call, not per window: otherwise the loop would only enqueue kernels and overrun the
        # window by the length of the queue.
        synchronize(device)
        count += 1
    return (meter.joules() - before) / count
