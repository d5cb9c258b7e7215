"""Counters of energy: NVML's for a GPU, the kernel's RAPL for processor packages.

They count the whole board or package, idle power and other processes included. Where neither can
be read nothing is estimated: `meter` raises `Unavailable` with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from bench.device.nvml import Board
from bench.device.unavailable import Unavailable

RAPL = Path("/sys/class/powercap")


class Meter(Protocol):
    """A counter of joules that only rises; `how` says what it counts."""

    how: str

    def joules(self) -> float:
        """Return the joules used since some moment in the past."""


def meter(device: torch.device) -> Meter:
    """Return the counter of a device.

    Raises:
        Unavailable: there is none that can be read.
    """
    return BoardMeter(device) if device.type == "cuda" else PackageMeter()


class BoardMeter:
    """The energy counter of an NVIDIA GPU."""

    how = "NVML's energy counter of the whole board"

    def __init__(self, device: torch.device) -> None:
        self._board = Board(device)
        self._board.joules()  # a GPU without the counter is found out here

    def joules(self) -> float:
        """Return the joules since the driver was loaded."""
        return self._board.joules()


class PackageMeter:
    """The sum over all processor packages, as Linux's powercap tells them.

    Each counter starts again at zero when it is full; read it more often than that (minutes).
    """

    how = "RAPL's counters of the processor packages"

    def __init__(self) -> None:
        zones = [zone for zone in RAPL.glob("intel-rapl:*") if _is_package(zone)]
        if not zones:
            raise Unavailable("this machine shows no energy counter (RAPL)")
        try:
            self._full = {zone: _read(zone / "max_energy_range_uj") for zone in zones}
            self._last = {zone: _read(zone / "energy_uj") for zone in zones}
        except PermissionError:
            raise Unavailable("the energy counter (RAPL) may be read by root only") from None
        self._sum = 0

    def joules(self) -> float:
        """Return the joules since this meter was made."""
        for zone, before in self._last.items():
            now = _read(zone / "energy_uj")
            self._sum += now - before if now >= before else now - before + self._full[zone]
            self._last[zone] = now
        return self._sum / 1e6


def _is_package(zone: Path) -> bool:
    """Whether a zone is a whole package: its parts (cores, memory) would be counted twice."""
    name = zone / "name"
    return name.exists() and name.read_text().startswith("package")


def _read(file: Path) -> int:
    return int(file.read_text())
