"""Latency of a model next to its dense baseline: speed-up, and the share of theory realised.

Suffixes: N networks, the measured one first; R rounds.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from bench.measurement import latency
from bench.measurement.cache import held
from bench.measurement.config import TimingConfig
from bench.measurement.cost import Cost
from bench.measurement.gap import Gap
from bench.measurement.interleaving import Rounds, Seconds, interleave
from bench.measurement.limits import Limits
from bench.measurement.ratio import Ratio, paired_ratio
from bench.measurement.rows import Rows
from bench.measurement.stages import DECODE, FORWARD, PREFILL
from bench.measurement.subject import Subject
from bench.measurement.traffic import bytes_read
from bench.measurement.workload import Answering, Workload

LEAST_SAVED = 0.05
"""Share of FLOPs: below it the realised share would divide noise by almost zero."""


def rows(subject: Subject, work: Workload, timing: TimingConfig, best: Limits | None) -> Rows:
    """Yield per stage the seconds, the speed-up, and the shares of theory and roofline reached."""
    device = subject.model.device
    # FLOPs and bytes are counted first, in calls of their own: hooks and dispatch modes would slow
    # the timed calls.
    flops = [latency.work_of(network, device, work) for network in subject.networks]
    bytes = _bytes_read(subject, work) if best else {}
    contestants = [latency.contestant(network, device, work) for network in subject.networks]
    compared = subject.dense is not None and not subject.no_gain
    # Without a comparison there is no ratio whose interval could decide: run `timing.rounds`.
    enough = partial(_precise, precision=timing.precision) if compared else lambda _: True
    rounds = interleave(contestants, device, timing, enough)
    said = {"rounds": float(rounds.count), "warm_up": float(rounds.warm_up)}
    said |= rounds.machine.numbers()
    for stage, seconds_NR in rounds.seconds.items():
        scope, own = f"{stage} {work.shape}", _percentiles(seconds_NR[0])
        done = [found.get(stage) for found in flops]
        parts = own | said | ({"flops": done[0]} if done[0] else {})
        if subject.dense:
            beside = _percentiles(seconds_NR[1])
            parts |= {f"dense_{name}": value for name, value in beside.items()}
        yield Cost(scope, "latency", "s", own["p50"], "measured", parts, rounds.note)
        if subject.no_gain:
            yield Gap(scope, "speedup", subject.no_gain)
        elif subject.dense:
            left = done[0] / done[1] if done[0] and done[1] else None
            yield from _gain(scope, _speedup(seconds_NR), left, rounds, timing.precision)
        if best and stage in bytes and done[0]:
            needs = {"flops": done[0], "bytes": bytes[stage]}
            share = best.least_seconds(**needs) / own["p50"]
            yield Cost(scope, "limit_share", "1", share, "measured", needs, rounds.note)
    yield from _overhead(subject, work, rounds.note)


def _precise(seconds: Seconds, precision: float) -> bool:
    return all(_speedup(seconds_NR).reach <= precision for seconds_NR in seconds.values())


def _speedup(seconds_NR: NDArray[np.float64]) -> Ratio:
    return paired_ratio(seconds_NR[1], seconds_NR[0])


def _gain(scope: str, ratio: Ratio, left: float | None, rounds: Rounds, precision: float) -> Rows:
    """Yield the speed-up, and the time saved as a fraction of the FLOPs saved (`realised`).

    `left` is the share of FLOPs that remains, None if they could not be counted. A realised share
    of 1 means that time fell as much as FLOPs, 0 that it did not fall, and below 0 that the model
    is slower than the dense one.
    """
    wide = f"the interval of the speed-up is still wider than {100 * precision:g} % to one side"
    note = "; ".join(filter(None, (rounds.note, wide if ratio.reach > precision else None))) or None
    parts = {"low": ratio.low, "high": ratio.high} | ({"theory": 1 / left} if left else {})
    yield Cost(scope, "speedup", "1", ratio.value, "measured", parts, note)
    if left is None:
        yield Gap(scope, "realised", "an operator has no FLOP formula")
        return
    if 1 - left < LEAST_SAVED:
        yield Gap(scope, "realised", f"under {100 * LEAST_SAVED:g} % of FLOPs saved")
        return
    # Seconds saved over FLOPs saved, both as shares of the dense model: time left is 1 / speed-up.
    # The function is monotonic, so the ends of the interval map to ends.
    shares = {
        name: (1 - 1 / gain) / (1 - left)
        for name, gain in (("low", ratio.low), ("high", ratio.high), ("middle", ratio.value))
    }
    yield Cost(scope, "realised", "1", shares.pop("middle"), "measured", shares, note)


def _overhead(subject: Subject, work: Workload, note: str | None) -> Rows:
    """Yield the seconds of a prefill that the method's own selection takes, if it makes one."""
    seconds = latency.overhead(subject.model, work)
    if seconds:
        found = _percentiles(np.array(seconds))
        scope = f"{PREFILL} {work.shape}"
        yield Cost(scope, "method_latency", "s", found["p50"], "measured", found, note)


@torch.no_grad()
def _bytes_read(subject: Subject, work: Workload) -> dict[str, float]:
    """Return the minimum of bytes read per stage; a decoding step also reads the prompt's cache."""
    model, inputs = subject.model, work.on(subject.model.device)
    network, anatomy = model.network, model.anatomy
    single = bytes_read(network, anatomy, lambda _: work.forward(network, inputs))
    if not isinstance(work, Answering):
        return {FORWARD: single}
    cache = held(work.forward(network, inputs).past_key_values)
    step = bytes_read(
        network,
        anatomy,
        # The prefill ends with the first token: clear what ran until then. If later steps run a
        # module several times its weights still count once, so this is the cost of one step.
        lambda forget: work.answer(network, inputs, lambda n: forget() if n == 1 else None),
    )
    return {PREFILL: single, DECODE: step + cache}


def _percentiles(seconds_R: NDArray[np.float64]) -> dict[str, float]:
    low, middle, high = np.percentile(seconds_R, [10, 50, 90])
    return {"p10": float(low), "p50": float(middle), "p90": float(high)}
