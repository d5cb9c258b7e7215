"""Seconds of a call by stage, and the FLOPs they are compared with.

Latency of a model per stage.

- `prefill`: one call over the prompts, inputs on the device, until the KV cache is filled.
- `first token`: from prompts in host memory to the ids of the first tokens in host memory.
- `decode`: from one token to the next, the mean over a generation.
- `end to end`: from prompts in host memory to the id of the last token.
- `forward`: one call of an image classifier; its `end to end` includes the transfer of images and
  classes.

FLOPs of a call, the theory that a measured speed-up is compared with.

They are counted in the same call that is timed, so that both skip the same work, whatever a method
does. Only this module connects timing to FLOP counting.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch

from bench.device.devices import Clock
from bench.measurement.flops.counter import count_flops
from bench.measurement.interleaving import Candidate
from bench.measurement.quantities import DECODE, END_TO_END, FIRST_TOKEN, FORWARD, PREFILL
from bench.measurement.workload import GenerationWorkload, Workload

if TYPE_CHECKING:
    from torch import nn

    from bench.models.model import Model

OVERHEAD_CALLS = 7
MIN_TIMED_SECONDS = 0.02


def candidate(network: nn.Module, device: torch.device, work: Workload) -> Candidate:
    """Return a callable that runs the workload once and returns the seconds of each stage."""
    resident = work.on(device)

    def forward() -> float:
        clock = Clock(device)
        clock.mark()
        made = work.forward(network, resident)
        clock.mark()
        (seconds,) = clock.laps()
        del made  # only after the last mark: freeing memory is not the network's work
        return seconds

    def classify() -> float:
        clock = Clock(device)
        clock.mark()
        # `cpu()` waits for the device, so the mark after it includes the transfer back.
        work.forward(network, work.on(device)).argmax(-1).cpu()
        clock.mark()
        return clock.laps()[0]

    def answer() -> list[float]:
        asked = cast(GenerationWorkload, work)
        clock = Clock(device)
        # One mark before and one per token: the laps are the first token, then each decoding step.
        clock.mark()
        asked.answer(network, asked.on(device), lambda _: clock.mark())
        return clock.laps()

    @torch.no_grad()
    def once() -> dict[str, float]:
        if not isinstance(work, GenerationWorkload):
            return {FORWARD: _median_seconds(forward), END_TO_END: _median_seconds(classify)}
        first, *others = answer()
        times = {
            FIRST_TOKEN: first,
            DECODE: statistics.fmean(others),
            END_TO_END: first + sum(others),
        }
        return {PREFILL: _median_seconds(forward), **times}

    return once


def _median_seconds(call: Callable[[], float]) -> float:
    """Return the median seconds of one call, over as many calls as take 20 ms together.

    A single call of less than a millisecond is too noisy.
    """
    seconds = [call()]
    while sum(seconds) < MIN_TIMED_SECONDS:
        seconds.append(call())
    return statistics.median(seconds)


@torch.no_grad()
def flops_by_stage(network: nn.Module, device: torch.device, work: Workload) -> dict[str, float]:
    """Return the FLOPs of each stage, counted in the same calls that are timed.

    A stage is left out if one of its operators has no FLOP formula.
    """
    inputs = work.on(device)
    single = stage_flops(lambda: work.forward(network, inputs))
    if single is None:
        return {}
    if not isinstance(work, GenerationWorkload):
        return {FORWARD: single, END_TO_END: single}
    whole = stage_flops(lambda: work.answer(network, inputs))
    if whole is None:
        return {PREFILL: single, FIRST_TOKEN: single}
    # A generation is one prefill, which yields the first token, and new_tokens - 1 decoding steps.
    decode = (whole - single) / (work.new_tokens - 1)
    return {PREFILL: single, FIRST_TOKEN: single, DECODE: decode, END_TO_END: whole}


@torch.no_grad()
def method_overhead(model: Model, work: Workload) -> list[float]:
    """Return the seconds that a method's own selection takes, one value per prefill.

    Measured in separate calls, because the device synchronisation around the selection costs time
    itself. Empty for a model without such a method.
    """
    if model.overhead is None:
        return []
    inputs, seconds = work.on(model.device), []
    for _ in range(OVERHEAD_CALLS):
        with model.overhead() as spent:
            work.forward(model.network, inputs)
        seconds.append(spent.seconds)
    return seconds


def stage_flops(call: Callable[[], object]) -> int | None:
    """Return the FLOPs of a call, two per multiply-add; None if an operator has no formula."""
    with count_flops() as counted:
        call()
    return None if counted.missed else counted.total
