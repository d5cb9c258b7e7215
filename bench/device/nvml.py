"""Readings from NVIDIA's management library (NVML): energy, clock rate, reasons for throttling.

nvidia-ml-py is optional (`pip install slimbench[energy]`). Without it, or on a GPU without the
counter, a reading raises `Unavailable` with the reason.
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
"""Bits of NVML's clock event reasons that invalidate a measurement.

The software power cap (0x04) is left out: a GPU under full load normally runs at its power limit.
"""
REASONS = (
    "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetCurrentClocksThrottleReasons",  # its older name
)


class Board:
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
        self._reasons = next((name for name in REASONS if hasattr(pynvml, name)), REASONS[0])
        # By UUID, because the indices differ: NVML numbers all GPUs in PCI order, CUDA only the
        # visible ones, and by default the fastest first.
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
        return float(self._ask("nvmlDeviceGetTotalEnergyConsumption", "energy counter")) / 1e3

    def megahertz(self) -> float:
        """Return the current clock rate of the streaming multiprocessors in MHz."""
        return float(self._ask("nvmlDeviceGetClockInfo", "clock", self._nvml.NVML_CLOCK_SM))

    def slowed(self) -> str | None:
        """Return why the clock is throttled now, None if it is not; a power cap does not count."""
        bits = int(self._ask(self._reasons, "clock reasons"))
        return next((reason for bit, reason in SLOWED.items() if bits & bit), None)

    def _ask(self, function: str, what: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except AttributeError:
            raise Unavailable(f"this version of nvidia-ml-py cannot read the {what}") from None
        except self._nvml.NVMLError as error:
            raise Unavailable(f"this GPU has no {what} ({error})") from None
