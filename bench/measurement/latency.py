"""Seconds of a call per stage, and the FLOPs that a measured speed-up is compared with.

- `prefill`: one call over the prompts, inputs on the device, until the KV cache is filled.
- `first token`: from prompts in host memory to the ids of the first tokens in host memory.
- `decode`: from one token to the next, the mean over a generation.
- `end to end`: from prompts in host memory to the id of the last token.
- `forward`: one call of an image classifier; its `end to end` includes the transfer of images and
  classes.

FLOPs are counted in the same call that is timed, so that both skip the same work, whatever a method
does. Only this module connects timing to FLOP counting.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bench.device.devices import Clock, call_seconds
from bench.measurement.flops.counter import count_flops
from bench.measurement.interleaving import Candidate
from bench.measurement.quantities import DECODE, END_TO_END, FIRST_TOKEN, FORWARD, PREFILL
from bench.measurement.workload import GenerationWorkload, Workload

if TYPE_CHECKING:
    from torch import nn

MIN_TIMED_SECONDS = 0.02


def candidate(network: nn.Module, device: torch.device, work: Workload) -> Candidate:
    """Return a callable that runs the workload once and returns the seconds of each stage."""
    resident = work.on(device)

    def forward() -> object:
        return work.forward(network, resident)

    def classify() -> object:
        # `cpu()` waits for the device, so the time includes the transfer back.
        return work.forward(network, work.on(device)).argmax(-1).cpu()

    def generate(generation: GenerationWorkload) -> list[float]:
        clock = Clock(device)
        # One mark before and one per token: the laps are the first token, then each decoding step.
        clock.mark()
        generation.generate(network, generation.on(device), lambda _: clock.mark())
        return clock.laps()

    @torch.no_grad()
    def once() -> dict[str, float]:
        if not isinstance(work, GenerationWorkload):
            return {
                FORWARD: _median_seconds(forward, device),
                END_TO_END: _median_seconds(classify, device),
            }
        first, *others = generate(work)
        times = {
            FIRST_TOKEN: first,
            DECODE: statistics.fmean(others),
            END_TO_END: first + sum(others),
        }
        return {PREFILL: _median_seconds(forward, device), **times}

    return once


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of one call, over as many calls as take 20 ms together.

    A single call of less than a millisecond is too noisy.
    """
    seconds = [call_seconds(call, device)]
    while sum(seconds) < MIN_TIMED_SECONDS:
        seconds.append(call_seconds(call, device))
    return statistics.median(seconds)


@dataclass(frozen=True)
class StageFlops:
    """FLOPs of a stage: `total` with masked pairs, `computed` without those a kernel may skip."""

    total: float
    computed: float

    def decoding_step(self, prefill: StageFlops, steps: int) -> StageFlops:
        """Return the mean of the `steps` that follow the prefill in this generation."""
        return StageFlops(
            (self.total - prefill.total) / steps, (self.computed - prefill.computed) / steps
        )


@torch.no_grad()
def flops_by_stage(
    network: nn.Module, device: torch.device, work: Workload
) -> dict[str, StageFlops]:
    """Return the FLOPs of each stage, counted in the same calls that are timed.

    A stage is left out if one of its operators has no FLOP formula.
    """
    inputs = work.on(device)
    single = stage_flops(lambda: work.forward(network, inputs))
    if single is None:
        return {}
    if not isinstance(work, GenerationWorkload):
        return {FORWARD: single, END_TO_END: single}
    whole = stage_flops(lambda: work.generate(network, inputs))
    if whole is None:
        return {PREFILL: single, FIRST_TOKEN: single}
    # A generation is one prefill, which yields the first token, and new_tokens - 1 decoding steps.
    decode = whole.decoding_step(single, work.new_tokens - 1)
    return {PREFILL: single, FIRST_TOKEN: single, DECODE: decode, END_TO_END: whole}


def stage_flops(call: Callable[[], object]) -> StageFlops | None:
    """Return the FLOPs of a call, two per multiply-add; None if an operator has no formula."""
    with count_flops() as counted:
        call()
    if counted.without_formula:
        return None
    computed = counted.total if counted.causal is None else counted.causal
    return StageFlops(counted.total, computed)
