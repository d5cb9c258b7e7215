"""Latency of a model compared with its dense baseline: speed-up, and its realised share.

Suffixes: N networks, the measured one first; R rounds. Stages of a workload:

- `prefill`: one call over the prompts, inputs on the device, until the KV cache is filled.
- `first token`: from prompts in host memory to the ids of the first tokens in host memory.
- `decode`: from one token to the next, the mean over a generation.
- `end to end`: from prompts in host memory to the id of the last token.
- `forward`: one call of an image classifier; its `end to end` includes transferring images and
  classes.

FLOPs are counted in the same calls that are timed, so that both skip the same work, whatever a
method does. Only this module connects timing to FLOP counting.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from bench.device.devices import Clock, call_seconds
from bench.measurement.flops.counter import count_flops
from bench.measurement.image_prompt import method_overhead
from bench.measurement.interleaving import (
    Candidate,
    Ratio,
    StageSeconds,
    TimedRounds,
    interleave,
    paired_ratio,
)
from bench.measurement.model_size import kv_cache_bytes
from bench.measurement.quantities import (
    DECODE,
    END_TO_END,
    FIRST_TOKEN,
    FORWARD,
    PREFILL,
    MeasuredPair,
    Measurements,
)
from bench.measurement.roofline import DeviceLimits, weight_bytes_read
from bench.measurement.workload import GenerationWorkload, Workload
from bench.records.record import Cost, MissingMeasurement
from bench.schema import TimingConfig

if TYPE_CHECKING:
    from torch import nn

MIN_FLOPS_SAVED = 0.05
"""Share of FLOPs; below it the realised share would divide noise by almost zero."""

MIN_TIMED_SECONDS = 0.02
"""Minimum total time of a stage's calls, because a single one below a millisecond is too noisy."""


def speedup_costs(
    subject: MeasuredPair, work: Workload, timing: TimingConfig, best: DeviceLimits | None
) -> Measurements:
    """Yield per stage the seconds, the speed-up, and the reached shares of theory and roofline."""
    device = subject.model.device
    # FLOPs and bytes are counted first, in separate calls, because hooks and dispatch modes would
    # slow down timed calls.
    flops = [flops_by_stage(network, device, work) for network in subject.networks]
    bytes_read = _bytes_read_by_stage(subject, work) if best else {}
    candidates = [candidate(network, device, work) for network in subject.networks]
    compared = subject.dense is not None and not subject.no_gain_reason
    # Without a comparison there is no interval to check, so exactly `timing.rounds` rounds run.
    is_precise = partial(_is_precise, precision=timing.precision) if compared else lambda _: True
    rounds = interleave(candidates, device, timing, is_precise)
    for stage, seconds_NR in rounds.seconds.items():
        scope = f"{stage} {work.shape}"
        done = [by_stage.get(stage) for by_stage in flops]
        latency_cost = _latency_cost(scope, seconds_NR, done[0], rounds)
        yield latency_cost
        if subject.no_gain_reason:
            yield MissingMeasurement(scope=scope, quantity="speedup", reason=subject.no_gain_reason)
        elif subject.dense:
            left = done[0].total / done[1].total if done[0] and done[1] else None
            yield from _gain_costs(scope, _speedup(seconds_NR), left, rounds, timing.precision)
        if best and stage in bytes_read and done[0]:
            # Causal kernels skip masked pairs, which would overstate the minimum time.
            needs = {"flops": done[0].computed, "bytes": bytes_read[stage]}
            yield Cost(
                scope=scope,
                quantity="roofline_efficiency",
                unit="1",
                value=best.min_seconds(**needs) / latency_cost.value,
                how="measured",
                parts=needs,
                note=rounds.note,
            )
    yield from _overhead_cost(subject, work, rounds.note)


def _latency_cost(
    scope: str, seconds_NR: NDArray[np.float64], flops: StageFlops | None, rounds: TimedRounds
) -> Cost:
    """Return the median seconds of a stage, with its spread and the state of the machine."""
    own = _percentiles(seconds_NR[0])
    parts = own | {"rounds": float(rounds.count), "warm_up": float(rounds.warmup_rounds)}
    parts |= rounds.machine.numbers()
    if flops:
        parts["flops"] = flops.total
    # With a baseline there are two networks, the dense one second.
    for dense_R in seconds_NR[1:]:
        parts |= {f"dense_{name}": value for name, value in _percentiles(dense_R).items()}
    return Cost(
        scope=scope,
        quantity="latency",
        unit="s",
        value=own["p50"],
        how="measured",
        parts=parts,
        note=rounds.note,
    )


def _is_precise(seconds: StageSeconds, precision: float) -> bool:
    return all(_speedup(seconds_NR).relative_reach <= precision for seconds_NR in seconds.values())


def _speedup(seconds_NR: NDArray[np.float64]) -> Ratio:
    return paired_ratio(seconds_NR[1], seconds_NR[0])


def _gain_costs(
    scope: str, ratio: Ratio, flops_left: float | None, rounds: TimedRounds, precision: float
) -> Measurements:
    """Yield the speed-up, and its share of the speed-up that the FLOPs allow.

    `flops_left` is the remaining share of FLOPs, None if they could not be counted.
    """
    wide = f"the interval of the speed-up is still wider than {100 * precision:g} % to one side"
    note = (
        "; ".join(filter(None, (rounds.note, wide if ratio.relative_reach > precision else None)))
        or None
    )
    parts = {"low": ratio.low, "high": ratio.high} | (
        {"theory": 1 / flops_left} if flops_left else {}
    )
    yield Cost(
        scope=scope,
        quantity="speedup",
        unit="1",
        value=ratio.value,
        how="measured",
        parts=parts,
        note=note,
    )
    yield _realised_share(scope, ratio, flops_left, note)


def _realised_share(
    scope: str, ratio: Ratio, flops_left: float | None, note: str | None
) -> Cost | MissingMeasurement:
    """Return the share of the speed-up that the FLOPs allow.

    A share of 1 means that time decreased as much as FLOPs, 0 that it did not decrease, and a
    negative share that the model is slower than the dense one.
    """
    quantity = "realised_speedup_fraction"
    if flops_left is None:
        return MissingMeasurement(
            scope=scope, quantity=quantity, reason="an operator has no FLOP formula"
        )
    if 1 - flops_left < MIN_FLOPS_SAVED:
        return MissingMeasurement(
            scope=scope,
            quantity=quantity,
            reason=f"under {100 * MIN_FLOPS_SAVED:g} % of FLOPs saved",
        )
    # Saved seconds divided by saved FLOPs, relative to the dense model, where the remaining time is
    # 1 / speed-up. The function is monotonic, so it maps ends of the interval to ends.
    shares = {
        name: (1 - 1 / gain) / (1 - flops_left)
        for name, gain in (("low", ratio.low), ("high", ratio.high), ("middle", ratio.value))
    }
    return Cost(
        scope=scope,
        quantity=quantity,
        unit="1",
        value=shares.pop("middle"),
        how="measured",
        parts=shares,
        note=note,
    )


def _overhead_cost(subject: MeasuredPair, work: Workload, note: str | None) -> Measurements:
    """Yield the seconds of a prefill for the method's own selection, if it has one."""
    model = subject.model
    inputs = work.on(model.device)
    seconds = method_overhead(model, lambda: work.forward(model.network, inputs))
    if seconds:
        found = _percentiles(np.array(seconds))
        scope = f"{PREFILL} {work.shape}"
        yield Cost(
            scope=scope,
            quantity="method_latency",
            unit="s",
            value=found["p50"],
            how="measured",
            parts=found,
            note=note,
        )


@torch.no_grad()
def _bytes_read_by_stage(subject: MeasuredPair, work: Workload) -> dict[str, float]:
    """Return the minimum bytes read per stage; a decoding step also reads the prompt's cache."""
    model, inputs = subject.model, work.on(subject.model.device)
    network, structure = model.network, model.structure
    single = weight_bytes_read(network, structure, lambda _: work.forward(network, inputs))
    if not isinstance(work, GenerationWorkload):
        return {FORWARD: single}
    cache = kv_cache_bytes(work.forward(network, inputs).past_key_values)
    step = weight_bytes_read(
        network,
        structure,
        # The prefill ends with the first token, so earlier records are cleared then. Weights count
        # once even if later steps run a module repeatedly, so this is the cost of one step.
        lambda forget: work.generate(network, inputs, lambda n: forget() if n == 1 else None),
    )
    return {PREFILL: single, DECODE: step + cache}


def _percentiles(seconds_R: NDArray[np.float64]) -> dict[str, float]:
    low, middle, high = np.percentile(seconds_R, [10, 50, 90])
    return {"p10": float(low), "p50": float(middle), "p90": float(high)}


def candidate(network: nn.Module, device: torch.device, work: Workload) -> Candidate:
    """Return a callable that runs the workload once and returns the seconds of each stage."""
    resident = work.on(device)

    def forward() -> object:
        return work.forward(network, resident)

    def classify() -> object:
        # `cpu()` waits for the device, so the time includes transferring the result.
        return work.forward(network, work.on(device)).argmax(-1).cpu()

    def generate(generation: GenerationWorkload) -> list[float]:
        clock = Clock(device)
        # One mark before and one per token: laps are the first token, then each decoding step.
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
    """Return the median seconds of one call, over as many as take `MIN_TIMED_SECONDS` in total."""
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
    generation = stage_flops(lambda: work.generate(network, inputs))
    if generation is None:
        return {PREFILL: single, FIRST_TOKEN: single}
    # A generation is one prefill, which yields the first token, and new_tokens - 1 decoding steps.
    decode = generation.decoding_step(single, work.new_tokens - 1)
    return {PREFILL: single, FIRST_TOKEN: single, DECODE: decode, END_TO_END: generation}


def stage_flops(call: Callable[[], object]) -> StageFlops | None:
    """Return the FLOPs of a call, two per multiply-add; None if an operator has no formula."""
    with count_flops() as counted:
        call()
    if counted.without_formula:
        return None
    computed = counted.total if counted.causal is None else counted.causal
    return StageFlops(counted.total, computed)
