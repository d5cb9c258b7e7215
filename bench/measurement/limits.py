"""What a device can do at best, measured here and now, and the least time that a call needs on it.

A call cannot be faster than its FLOPs at the rate of a large matrix product, nor than its bytes at
the bandwidth of a large copy (the roofline model: Williams, Waterman, Patterson, CACM 2009).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.device.clock import Clock

REPEATS = 5
SIDE = {"cuda": 8192, "cpu": 1024}
"""Of the square matrices: large enough that a product is limited by arithmetic."""
COPIED = {"cuda": 2**30, "cpu": 2**27}
"""Bytes of the copy: many times larger than any cache."""


@dataclass(frozen=True)
class Limits:
    """FLOP/s of a matrix product and bytes/s of a copy, read and written bytes both counted."""

    matrix_rate: float
    bandwidth: float

    def least_seconds(self, flops: float, bytes: float) -> float:
        """Return the time that a call of so many FLOPs and bytes needs at least."""
        return max(flops / self.matrix_rate, bytes / self.bandwidth)


@functools.cache
def limits(device: torch.device, dtype: torch.dtype, threads: int) -> Limits:
    """Measure a device's limits for one number format, once per process; the best of five.

    `threads` are torch's on the CPU, on which the limits depend.
    """
    side, copied = SIDE[device.type], COPIED[device.type]
    a_NN = torch.ones(side, side, dtype=dtype, device=device)
    product_NN = torch.empty_like(a_NN)
    rate = 2 * side**3 / _best(device, lambda: torch.mm(a_NN, a_NN, out=product_NN))
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Limits(rate, 2 * copied / _best(device, lambda: target.copy_(source)))


def _best(device: torch.device, call: Callable[[], object]) -> float:
    """Return the seconds of the fastest of some calls, after one that does not count."""
    call()
    clock = Clock(device)
    clock.mark()
    for _ in range(REPEATS):
        call()
        clock.mark()
    return min(clock.laps())
