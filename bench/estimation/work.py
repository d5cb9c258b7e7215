"""Work in quantities that hardware has a rate for, and the time that it takes at least and at most.

Roofline model (Williams, Waterman, Patterson, CACM 2009) with ranges in place of peaks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import sqrt
from typing import Literal, NamedTuple

from bench.estimation.hardware import HardwareConfig

Bound = Literal["compute", "memory bandwidth", "host link", "disk", "Python"]
"""What binds a phase: what it would be faster without."""


@dataclass(frozen=True)
class Work:
    """Quantities of work; they add up, and are multiplied by a number of repetitions.

    `matrix` is FLOPs of matrix products and `attention` those of queries with keys and values,
    masked pairs included; `precise` is FLOPs of products that are computed in float32 whatever the
    model's dtype, those in float64 counted twice. `weights` is bytes of weights that
    products read, each once per call, and `moved` bytes that everything else reads and writes.
    `operators` are launched by Python, `requests` handled by a harness, `starts` networks that are
    built. `link` and `disk` are bytes. `seconds` is time that is known as such, and `timed` that of
    calls like those that were timed on the hardware.
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
"""Time of a call in a run over its time when it was timed alone: the least and the most."""


class Time(NamedTuple):
    """Seconds at least and at most, and what binds."""

    low: float
    high: float
    bound_by: Bound


def time_of(work: Work, hardware: HardwareConfig, dtype: str) -> Time:
    """Return the time that work takes on hardware, in a dtype.

    A CPU does one thing after the other. A GPU computes while Python prepares what follows and
    while the link brings it: at best the slowest of them hides the others, at worst none is hidden.

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
    # The harness makes its requests before the first forward and scores after the last.
    alone = least + low["disk"] + _outside(work, hardware)[0]
    inside = low["Python"] - _outside(work, hardware)[0]
    return Time(alone + max(device, inside, low["host link"]), most + sum(high.values()), bound_by)


def _outside(work: Work, hardware: HardwareConfig) -> tuple[float, float]:
    """Return the seconds of Python that no kernel runs beside."""
    low, high = (
        work.requests * hardware.request[end] + work.starts * hardware.start[end] for end in (0, 1)
    )
    return low, high


def _parts(work: Work, hardware: HardwareConfig, dtype: str, end: int) -> dict[Bound, float]:
    """Return seconds by what binds; `end` is 1 for the most that is reached, 0 for the least."""
    reached, peak = hardware.utilisation, hardware.rate(dtype)
    bandwidth = hardware.bandwidth * reached.memory[end]
    products = work.matrix / (peak * reached.matrix[end])
    if work.precise:
        products += work.precise / (hardware.rate("float32") * reached.matrix[end])
    reading = work.weights / bandwidth
    # A product streams its weights while it computes, so the longer of the two is its time.
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
