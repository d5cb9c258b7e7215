"""Energy counters: NVML for a GPU, the kernel's RAPL interface for CPU packages.

Both count the whole board or package, including idle power and other processes. A RAPL package of
an Intel server does not include its DRAM. Nothing is estimated: without a readable counter,
`energy_meter` raises `Unavailable` with the reason.

NVML also reports the clock rate and the reasons for throttling. nvidia-ml-py is optional
(`pip install slimbench[energy]`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

RAPL = Path("/sys/class/powercap")


class Unavailable(Exception):
    """A quantity cannot be measured on this machine; tables show the message as the reason."""


class EnergyMeter(Protocol):
    """A monotonic counter of joules; `how` says what it counts, for the note of a cost."""

    how: str

    def joules(self) -> float:
        """Return the joules used since an arbitrary, fixed moment."""


def energy_meter(device: torch.device) -> EnergyMeter:
    """Return the energy counter of a device.

    Raises:
        Unavailable: the device has no counter, or it is not readable.
    """
    return NvmlMeter(device) if device.type == "cuda" else RaplMeter()


class NvmlMeter:
    """The energy counter of an NVIDIA GPU."""

    how = "NVML energy counter of the whole board"

    def __init__(self, device: torch.device) -> None:
        self._board = NvmlDevice(device)
        # Read once, so that a GPU without the counter fails before the measurement.
        self._board.joules()

    def joules(self) -> float:
        """Return the joules used since the driver was loaded."""
        return self._board.joules()


class RaplMeter:
    """The sum over all CPU packages, read through Linux's powercap interface.

    The hardware counters wrap around within minutes under load: read `joules` more often than that.
    """

    how = "RAPL energy counters of the CPU packages"

    def __init__(self) -> None:
        zones = [zone for zone in RAPL.glob("intel-rapl:*") if _is_package(zone)]
        if not zones:
            raise Unavailable("this machine has no energy counter (RAPL)")
        # Readable only by root since Linux 5.10: unprivileged readings allowed the PLATYPUS attack
        # (CVE-2020-8694).
        try:
            self._range = {zone: _read_counter(zone / "max_energy_range_uj") for zone in zones}
            self._last = {zone: _read_counter(zone / "energy_uj") for zone in zones}
        except PermissionError:
            raise Unavailable("the energy counter (RAPL) is readable by root only") from None
        self._total = 0

    def joules(self) -> float:
        """Return the joules used since this meter was created."""
        # The sum is stored here, because after a wrap-around a difference of two readings is wrong.
        # At most one wrap-around per counter can be detected between two readings.
        for zone, before in self._last.items():
            now = _read_counter(zone / "energy_uj")
            self._total += now - before if now >= before else now - before + self._range[zone]
            self._last[zone] = now
        return self._total / 1e6


def _is_package(zone: Path) -> bool:
    # The glob also finds subzones (such as the cores), which would be counted twice, and `psys`,
    # which contains the packages.
    name = zone / "name"
    return name.exists() and name.read_text().startswith("package")


def _read_counter(file: Path) -> int:
    return int(file.read_text())


SLOWDOWN_REASONS = {
    0x20: "slowed by heat",
    0x40: "slowed by heat",
    0x80: "slowed by its power supply",
    # NVML sets this bit together with more specific ones above; the first match is used.
    0x08: "slowed by the hardware",
}
"""Bits of NVML's clock event reasons that invalidate a measurement, the most specific first.

The software power cap (0x04) is left out: a GPU under full load normally runs at its power limit.
"""
CLOCK_REASON_FUNCTIONS = (
    "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetCurrentClocksThrottleReasons",  # Its older name.
)


class NvmlDevice:
    """The NVML handle of one GPU.

    Raises:
        Unavailable: nvidia-ml-py is not installed, or NVML does not know the device.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            import pynvml
        except ImportError:
            raise Unavailable("nvidia-ml-py is not installed") from None
        self._nvml: Any = pynvml
        self._reasons = next(
            (name for name in CLOCK_REASON_FUNCTIONS if hasattr(pynvml, name)),
            CLOCK_REASON_FUNCTIONS[0],
        )
        # By UUID, because the indices differ: NVML numbers all GPUs in PCI order, CUDA only visible
        # ones and by default the fastest first.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError as error:
            raise Unavailable(f"NVML does not answer for {uuid}: {error}") from None

    def joules(self) -> float:
        """Return the energy that the whole board has used since its driver was loaded.

        Raises:
            Unavailable: the GPU has no such counter (GPUs before Volta).
        """
        # NVML counts millijoules.
        return float(self._query("nvmlDeviceGetTotalEnergyConsumption", "energy counter")) / 1e3

    def clock_mhz(self) -> float:
        """Return the current clock rate of the streaming multiprocessors in MHz."""
        return float(self._query("nvmlDeviceGetClockInfo", "clock", self._nvml.NVML_CLOCK_SM))

    def power_limit(self) -> float:
        """Return the maximum power of the board in W."""
        # NVML counts milliwatts.
        return float(self._query("nvmlDeviceGetEnforcedPowerLimit", "power limit")) / 1e3

    def slowed(self) -> str | None:
        """Return why the clock is throttled, None if it is not; a power cap does not count."""
        bits = int(self._query(self._reasons, "clock reasons"))
        return next((reason for bit, reason in SLOWDOWN_REASONS.items() if bits & bit), None)

    def _query(self, function: str, what: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except AttributeError:
            raise Unavailable(f"this version of nvidia-ml-py cannot read the {what}") from None
        except self._nvml.NVMLError as error:
            raise Unavailable(f"this GPU has no {what} ({error})") from None
