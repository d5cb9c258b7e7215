"""Monitor of the machine during a measurement: threads, clock rates, load by other processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import psutil
import torch

from bench.device.energy_counters import NvmlDevice, Unavailable

Value = TypeVar("Value")
TOLERATED_LOAD = 0.1
"""Fraction of the needed cores that other processes may use on a quiet machine."""
NOT_BUSY_FIELDS = ("idle", "iowait", "guest", "guest_nice")
"""psutil's CPU times that are not separate work: idle times, and guests, part of user time."""


@dataclass(frozen=True)
class MachineReading:
    """State of the machine during a measurement.

    `cores` is the number of cores that this process may use, `others` how many of them other
    processes kept busy on average, `needed` how many the measurement needs. Clock rates are in MHz,
    None where unknown; `slowed` is the reason for a throttled GPU.
    """

    threads: int
    cores: int
    needed: int
    others: float
    cpu_mhz: float | None
    gpu_mhz: float | None
    slowed: str | None

    @property
    def fault(self) -> str | None:
        """Why the measurement is not reliable; None on a quiet machine."""
        if self.slowed:
            return f"the GPU was {self.slowed}"
        if self.cores - self.others < (1 - TOLERATED_LOAD) * self.needed:
            return (
                f"the machine was loaded: others kept {self.others:.1f} of {self.cores} cores busy"
            )
        return None

    def numbers(self) -> dict[str, float]:
        """Return the known values under the names that a record uses."""
        known = {
            "threads": float(self.threads),
            "cores": float(self.cores),
            "cores_of_others": round(self.others, 3),
            "cpu_mhz": self.cpu_mhz,
            "gpu_mhz": self.gpu_mhz,
        }
        return {name: value for name, value in known.items() if value is not None}


class MachineMonitor:
    """Monitors the machine during a `with` block; afterwards `reading` holds the result."""

    reading: MachineReading

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._board = _nvml_device(device)

    def __enter__(self) -> Self:
        self._busy, self._own, self._total = _cpu_seconds()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The load average covers a minute and includes the measurement itself. Instead, the CPU
        # time of our cores minus our own is that of other processes. The same counters, which
        # advance in ticks, give the elapsed time, so that the ratio is correct for short blocks.
        busy, own, total = _cpu_seconds()
        passed = max(total - self._total, 1e-9) / len(_cores())
        others = (busy - self._busy - (own - self._own)) / passed
        threads = torch.get_num_threads()
        # One thread feeds a GPU, while on a CPU every thread needs a core.
        needed = 1 if self._device.type == "cuda" else min(threads, len(_cores()))
        self.reading = MachineReading(
            threads=threads,
            cores=len(_cores()),
            needed=needed,
            # Rounding to ticks can exceed the range.
            others=min(max(others, 0.0), float(len(_cores()))),
            cpu_mhz=_cpu_megahertz(),
            gpu_mhz=_query(self._board, NvmlDevice.clock_mhz),
            slowed=_query(self._board, NvmlDevice.slowed),
        )


def measured_quietly(
    measure: Callable[[], Value],
    device: torch.device,
    attempts: int,
    seconds: float = math.inf,
) -> tuple[Value, MachineReading]:
    """Measure until other processes do not disturb it, `attempts` times at most.

    No attempt begins when `seconds` have passed. Return the value of the least disturbed attempt,
    and the state of the machine during it.
    """
    tried: list[tuple[Value, MachineReading]] = []
    began = time.monotonic()
    while len(tried) < attempts and (not tried or time.monotonic() - began < seconds):
        with MachineMonitor(device) as monitor:
            value = measure()
        tried.append((value, monitor.reading))
        if monitor.reading.fault is None:
            break
    return min(tried, key=lambda each: (bool(each[1].fault), each[1].others))


def _cores() -> list[int]:
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):
        return list(process.cpu_affinity())
    return list(range(psutil.cpu_count() or 1))  # macOS has no affinity.


def _cpu_seconds() -> tuple[float, float, float]:
    """Return CPU seconds: our cores busy, used by this process, our cores in total."""
    # Only this process's cores, because load on other cores does not slow it down.
    per_core = psutil.cpu_times(percpu=True)
    times = [per_core[core]._asdict() for core in _cores() if core < len(per_core)]
    # On Linux, guest time is part of user time and must not be added.
    total = sum(sum(v for k, v in each.items() if not k.startswith("guest")) for each in times)
    busy = sum(sum(v for k, v in each.items() if k not in NOT_BUSY_FIELDS) for each in times)
    # Without child processes, such as workers of a data loader: they disturb a measurement, so
    # their time counts as that of others.
    own = psutil.Process().cpu_times()
    return busy, own.user + own.system, total


def _cpu_megahertz() -> float | None:
    frequency = psutil.cpu_freq()
    return None if frequency is None else float(frequency.current)


def _nvml_device(device: torch.device) -> NvmlDevice | None:
    try:
        return NvmlDevice(device) if device.type == "cuda" else None
    except Unavailable:
        return None


def _query(board: NvmlDevice | None, reading: Callable[[NvmlDevice], Value]) -> Value | None:
    # These readings are optional in a record: a GPU without one must not fail the run.
    try:
        return None if board is None else reading(board)
    except Unavailable:
        return None
