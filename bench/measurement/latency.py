"""How long a model takes, stage by stage.

- `prefill`: one call over the prompts, inputs on the device, until the cache is filled.
- `first token`: from prompts in host memory to the first tokens' ids in host memory.
- `decode`: from one token to the next, the mean over an answer.
- `end to end`: from prompts in host memory to the last token's id.
- `forward`: an image classifier's one call; `end to end` includes moving images and classes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch

from bench.device.clock import Clock
from bench.measurement.interleaving import Contestant
from bench.measurement.stages import DECODE, FIRST, FORWARD, PREFILL, WHOLE
from bench.measurement.theory import flops
from bench.measurement.workload import Answering, Workload

if TYPE_CHECKING:
    from torch import nn

    from bench.models.model import Model

OVERHEAD_CALLS = 7
LEAST_SECONDS = 0.02


def contestant(network: nn.Module, device: torch.device, work: Workload) -> Contestant:
    """Return a call that does the work once and tells the seconds of each stage."""
    resident = work.on(device)

    def forward() -> float:
        clock = Clock(device)
        clock.mark()
        made = work.forward(network, resident)
        clock.mark()
        (seconds,) = clock.laps()
        del made  # only now: giving memory back is not the network's work
        return seconds

    def classify() -> float:
        clock = Clock(device)
        clock.mark()
        work.forward(network, work.on(device)).argmax(-1).cpu()
        clock.mark()
        return clock.laps()[0]

    def answer() -> list[float]:
        asked = cast(Answering, work)
        clock = Clock(device)
        clock.mark()
        asked.answer(network, asked.on(device), lambda _: clock.mark())
        return clock.laps()

    @torch.no_grad()
    def once() -> dict[str, float]:
        if not isinstance(work, Answering):
            return {FORWARD: _often(forward), WHOLE: _often(classify)}
        first, *others = answer()
        times = {FIRST: first, DECODE: statistics.fmean(others), WHOLE: first + sum(others)}
        return {PREFILL: _often(forward), **times}

    return once


def _often(call: Callable[[], float]) -> float:
    """Return the median seconds of as many calls as take 20 ms together, at least of one.

    A call of less than a millisecond says little alone.
    """
    seconds = [call()]
    while sum(seconds) < LEAST_SECONDS:
        seconds.append(call())
    return statistics.median(seconds)


@torch.no_grad()
def work_of(network: nn.Module, device: torch.device, work: Workload) -> dict[str, float]:
    """Return the FLOPs of each stage, counted in the calls that `contestant` times.

    Nothing where an operator has no formula.
    """
    inputs = work.on(device)
    single = flops(lambda: work.forward(network, inputs))
    if single is None:
        return {}
    if not isinstance(work, Answering):
        return {FORWARD: single, WHOLE: single}
    whole = flops(lambda: work.answer(network, inputs))
    if whole is None:
        return {PREFILL: single, FIRST: single}
    decode = (whole - single) / (work.new_tokens - 1)
    return {PREFILL: single, FIRST: single, DECODE: decode, WHOLE: whole}


@torch.no_grad()
def overhead(model: Model, work: Workload) -> list[float]:
    """Return the seconds that a method's own choices take in each of some prefills.

    Timed in calls apart, since waiting for a device around them costs time itself; empty for a
    model without such a method.
    """
    if model.overhead is None:
        return []
    inputs, seconds = work.on(model.device), []
    for _ in range(OVERHEAD_CALLS):
        with model.overhead() as spent:
            work.forward(model.network, inputs)
        seconds.append(spent.seconds)
    return seconds
