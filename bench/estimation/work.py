"""Work in quantities for which hardware has a rate, and bounds on its time.

Roofline model (Williams, Waterman, Patterson, CACM 2009) with ranges instead of peaks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import sqrt
from typing import Literal, NamedTuple

from bench.estimation.hardware import HardwareConfig

Bound = Literal["compute", "memory bandwidth", "host link", "disk", "Python"]
"""The resource that limits the speed of a phase."""


@dataclass(frozen=True)
class Work:
    """Quantities of work, which can be added and multiplied by a number of repetitions.

    `matrix` is FLOPs of matrix products, and `attention` is FLOPs of queries with keys and values,
    including masked pairs. `precise` is FLOPs of products in float32 whatever the model's dtype,
    where float64 counts twice. `weights` is bytes of weights that products read, once per call, and
    `moved` is bytes that everything else reads and writes. `operators` is the number of operators
    launched by Python, `requests` that of requests of a harness, `starts` that of networks built.
    `link` and `disk` are bytes. `seconds` is known time, and `timed` is the measured time of
    similar calls on the hardware.
    """

    matrix: float = 0.0
    precise: float = 0.0
    attention: float = 0.0
    weights: float = 0.0
    moved: float = 0.0
    operators: float = 0.0
    requests: float = 0.0
    starts: float = 0.0
    link: float = 0.0
    disk: float = 0.0
    seconds: float = 0.0
    timed: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> Work:
        return Work(*(getattr(self, f.name) * times for f in fields(self)))

    @property
    def flops(self) -> float:
        """FLOPs of products and attention."""
        return self.matrix + self.precise + self.attention


TIMED = (0.8, 1.5)
"""Bounds of the ratio between a call's time in a run and its time when measured alone."""


class Time(NamedTuple):
    """Lower and upper bound in seconds, and the limiting resource."""

    low: float
    high: float
    bound_by: Bound


def time_of(work: Work, hardware: HardwareConfig, dtype: str) -> Time:
    """Return the time of work on hardware, in a dtype.

    A CPU works sequentially. A GPU computes while Python launches operators and the link
    transfers data: at best the slowest of them hides the others, at worst none is hidden.

    Raises:
        UserError: the hardware has no rate for the dtype.
    """
    low, high = (_parts(work, hardware, dtype, end) for end in (1, 0))
    middle = {name: sqrt(low[name] * high[name]) for name in low}
    bound_by = max(middle, key=lambda name: middle[name])
    least, most = (work.seconds + work.timed * share for share in TIMED)
    if hardware.device == "cpu":
        return Time(least + sum(low.values()), most + sum(high.values()), bound_by)
    device = low["compute"] + low["memory bandwidth"]
    # The harness builds its requests before the first forward and computes scores after the last.
    alone = least + low["disk"] + _outside(work, hardware)[0]
    inside = low["Python"] - _outside(work, hardware)[0]
    return Time(alone + max(device, inside, low["host link"]), most + sum(high.values()), bound_by)


def _outside(work: Work, hardware: HardwareConfig) -> tuple[float, float]:
    """Return the seconds of Python that do not overlap with kernels."""
    low, high = (
        work.requests * hardware.request[end] + work.starts * hardware.start[end] for end in (0, 1)
    )
    return low, high


def _parts(work: Work, hardware: HardwareConfig, dtype: str, end: int) -> dict[Bound, float]:
    """Return seconds by limiting resource; `end` is 1 for the highest rates, 0 for the lowest."""
    reached, peak = hardware.utilisation, hardware.rate(dtype)
    bandwidth = hardware.bandwidth * reached.memory[end]
    products = work.matrix / (peak * reached.matrix[end])
    if work.precise:
        products += work.precise / (hardware.rate("float32") * reached.matrix[end])
    reading = work.weights / bandwidth
    # A product reads its weights while it computes, so the longer of the two times counts.
    computing, waiting = (products, 0.0) if products >= reading else (0.0, reading)
    attention = work.attention / (peak * reached.attention[end])
    link = (hardware.link or float("inf")) * reached.link[end]
    return {
        "compute": computing + attention,
        "memory bandwidth": waiting + work.moved / bandwidth,
        "host link": work.link / link,
        "disk": work.disk / hardware.disk[end],
        "Python": work.operators * hardware.operator[1 - end] + _outside(work, hardware)[1 - end],
    }
