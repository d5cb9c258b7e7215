"""Energy counters: NVML for a GPU, the kernel's RAPL interface for CPU packages.

Both count the whole board or package, including idle power and other processes. Nothing is
estimated: without a readable counter, `meter` raises `Unavailable` with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from bench.device.nvml import Board
from bench.device.unavailable import Unavailable

RAPL = Path("/sys/class/powercap")


class Meter(Protocol):
    """A monotonic counter of joules; `how` says what it counts, for the note of a cost."""

    how: str

    def joules(self) -> float:
        """Return the joules used since an arbitrary, fixed moment."""


def meter(device: torch.device) -> Meter:
    """Return the energy counter of a device.

    Raises:
        Unavailable: the device has no counter, or it is not readable.
    """
    return BoardMeter(device) if device.type == "cuda" else PackageMeter()


class BoardMeter:
    """The energy counter of an NVIDIA GPU."""

    how = "NVML energy counter of the whole board"

    def __init__(self, device: torch.device) -> None:
        self._board = Board(device)
        # That a GPU lacks the counter shows only when it is read: fail before the measurement.
        self._board.joules()

    def joules(self) -> float:
        """Return the joules used since the driver was loaded."""
        return self._board.joules()


class PackageMeter:
    """The sum over all CPU packages, read through Linux's powercap interface.

    The hardware counters wrap around within minutes under load: read `joules` more often than that.
    """

    how = "RAPL energy counters of the CPU packages"

    def __init__(self) -> None:
        zones = [zone for zone in RAPL.glob("intel-rapl:*") if _is_package(zone)]
        if not zones:
            raise Unavailable("this machine has no energy counter (RAPL)")
        # Readable by root only since Linux 5.10: unprivileged readings allowed the PLATYPUS attack
        # (CVE-2020-8694).
        try:
            self._full = {zone: _read(zone / "max_energy_range_uj") for zone in zones}
            self._last = {zone: _read(zone / "energy_uj") for zone in zones}
        except PermissionError:
            raise Unavailable("the energy counter (RAPL) is readable by root only") from None
        self._sum = 0

    def joules(self) -> float:
        """Return the joules used since this meter was created."""
        # The sum is kept here, because after a wrap-around a difference of two readings is wrong.
        # Between two readings, at most one wrap-around per counter can be detected.
        for zone, before in self._last.items():
            now = _read(zone / "energy_uj")
            self._sum += now - before if now >= before else now - before + self._full[zone]
            self._last[zone] = now
        return self._sum / 1e6


def _is_package(zone: Path) -> bool:
    # The glob also finds subzones (such as the cores), which would be counted twice, and `psys`,
    # which contains the packages.
    name = zone / "name"
    return name.exists() and name.read_text().startswith("package")


def _read(file: Path) -> int:
    return int(file.read_text())
