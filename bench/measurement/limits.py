"""Roofline of a device: its measured peak rates, and the minimum time that a call needs.

A call cannot be faster than its FLOPs at the rate of a large matmul, nor than its bytes at the
bandwidth of a large copy (roofline model: Williams, Waterman, Patterson, CACM 2009).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.device.clock import Clock

REPEATS = 5
SIDE = {"cuda": 8192, "cpu": 1024}
"""Side of the square matrices: large enough that the matmul is bound by arithmetic."""
COPIED = {"cuda": 2**30, "cpu": 2**27}
"""Bytes of the copy: many times the size of any cache."""


@dataclass(frozen=True)
class Limits:
    """FLOP/s of a matmul, and bytes/s of a copy with read and written bytes both counted."""

    matrix_rate: float
    bandwidth: float

    def least_seconds(self, flops: float, bytes: float) -> float:
        """Return the minimum time of a call with these FLOPs and bytes."""
        # The maximum, not the sum: arithmetic and memory traffic can overlap completely.
        return max(flops / self.matrix_rate, bytes / self.bandwidth)


@functools.cache
def limits(device: torch.device, dtype: torch.dtype, threads: int) -> Limits:
    """Measure a device's limits for one dtype, once per process, as the best of five calls.

    `threads` is torch's number of CPU threads; it is part of the cache key because CPU limits
    depend on it.
    """
    side, copied = SIDE[device.type], COPIED[device.type]
    a_NN = torch.ones(side, side, dtype=dtype, device=device)
    product_NN = torch.empty_like(a_NN)
    rate = 2 * side**3 / _best(device, lambda: torch.mm(a_NN, a_NN, out=product_NN))
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Limits(rate, 2 * copied / _best(device, lambda: target.copy_(source)))


def _best(device: torch.device, call: Callable[[], object]) -> float:
    """Return the seconds of the fastest of several calls, after a warm-up call."""
    # The fastest, since a limit must not be understated: a share of it could exceed 1.
    call()
    clock = Clock(device)
    clock.mark()
    for _ in range(REPEATS):
        call()
        clock.mark()
    return min(clock.laps())
