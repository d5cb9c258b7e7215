"""NVIDIA's management library, as far as a measurement needs it: energy, clock, what slows it.

nvidia-ml-py is optional (`pip install slimbench[energy]`); without it, or without a GPU that has
the counter, a quantity is `Unavailable`, with the reason.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.device.unavailable import Unavailable

SLOWED = {
    0x08: "slowed by the hardware",
    0x20: "slowed by heat",
    0x40: "slowed by heat",
    0x80: "slowed by its power supply",
}
"""Bits of NVML's clock event reasons that spoil a measurement; a power cap is the normal case."""
REASONS = (
    "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetCurrentClocksThrottleReasons",  # its older name
)


class Board:
    """One GPU as NVML knows it, found by its UUID: NVML and CUDA number devices differently.

    Raises:
        Unavailable: nvidia-ml-py is not installed, or NVML does not know the device.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            import pynvml
        except ImportError:
            raise Unavailable("nvidia-ml-py is not installed") from None
        self._nvml: Any = pynvml
        self._reasons = next((name for name in REASONS if hasattr(pynvml, name)), REASONS[0])
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError as error:
            raise Unavailable(f"NVML does not answer for {uuid}: {error}") from None

    def joules(self) -> float:
        """Return the energy that the whole board has used since its driver was loaded.

        Raises:
            Unavailable: the GPU has no such counter (those before Volta have none).
        """
        return float(self._ask("nvmlDeviceGetTotalEnergyConsumption", "energy counter")) / 1e3

    def megahertz(self) -> float:
        """Return the current clock of the multiprocessors."""
        return float(self._ask("nvmlDeviceGetClockInfo", "clock", self._nvml.NVML_CLOCK_SM))

    def slowed(self) -> str | None:
        """Return what keeps the clock down just now, other than a power cap."""
        bits = int(self._ask(self._reasons, "clock reasons"))
        return next((reason for bit, reason in SLOWED.items() if bits & bit), None)

    def _ask(self, function: str, what: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except AttributeError:
            raise Unavailable(f"this nvidia-ml-py cannot ask for the {what}") from None
        except self._nvml.NVMLError as error:
            raise Unavailable(f"this GPU has no {what} ({error})") from None
