"""Peak memory of a block of work, above what was in use before it.

On a GPU, PyTorch's allocator reports it exactly. On Linux, the kernel records the peak resident set
of the process and can reset it, so no short peak is missed. It counts whole pages with an error of
some hundred KiB, and does not see allocations that fit into free gaps of the heap, so a small peak
may be reported too low. Pages of mapped files that the block reads (weights, or libraries that it
uses first) are left out, because the kernel can drop them. On other systems the resident set is
sampled through psutil, which can miss a peak shorter than the sampling interval.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import psutil
import torch

from bench.device.devices import trim_heap

SAMPLE_SECONDS = 0.002
PROC_STATUS, PROC_CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): set the recorded peak to the current resident set.


# torch has an error class only for its GPU allocator. The CPU allocator raises a plain
# RuntimeError, and so do libraries that allocate GPU memory themselves (workspaces, handles).
OUT_OF_MEMORY_MESSAGES = (
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)


class MemoryGauge(Protocol):
    """Source of memory readings; `how` names it in the note of a cost."""

    how: str

    def now(self) -> int:
        """Return the bytes in use."""

    def reset(self) -> None:
        """Discard the peak so far."""

    def peak(self) -> int:
        """Return the maximum number of bytes in use since the last reset."""

    def close(self) -> None:
        """Stop measuring."""


class PeakMemory:
    """Measures memory during a `with` block; `above` is the peak in bytes above the start."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gauge: MemoryGauge | None = None
        self._before = 0
        self.above = 0
        self.how = ""

    def __enter__(self) -> Self:
        trim_heap(self._device)
        self._gauge = _memory_gauge(self._device)
        self.how = self._gauge.how
        self._before = self._gauge.now()
        self._gauge.reset()
        return self

    def restart(self) -> None:
        """Discard the peak so far, but keep the reading at the start of the block."""
        assert self._gauge is not None
        trim_heap(self._device)
        self._gauge.reset()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._gauge is not None
        # The difference may be negative by the kernel's error of some hundred KiB.
        self.above = max(self._gauge.peak() - self._before, 0)
        self._gauge.close()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error means that GPU or CPU memory is exhausted."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        part in str(error) for part in OUT_OF_MEMORY_MESSAGES
    )


def _memory_gauge(device: torch.device) -> MemoryGauge:
    if device.type == "cuda":
        return _AllocatorGauge(device)
    return _ResidentPeakGauge() if _ResidentPeakGauge.works() else _SampledGauge()


class _AllocatorGauge:
    """PyTorch's caching allocator: memory of tensors, without cached blocks."""

    how = "torch's allocator"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def close(self) -> None:
        pass


class _ResidentPeakGauge:
    """The kernel's record of the peak resident set (VmHWM), without pages of mapped files."""

    how = "the kernel's peak resident set"

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._mapped = 0

    @classmethod
    def works(cls) -> bool:
        """Return whether this kernel records the peak and allows for resetting it."""
        # Tested by trying: kernels before 4.0 or without CONFIG_PROC_PAGE_MONITOR cannot reset it,
        # and a container may mount /proc read-only.
        try:
            PROC_CLEAR_REFS.write_text(RESET_PEAK)
        except OSError:
            return False
        return "VmHWM" in PROC_STATUS.read_text()

    def now(self) -> int:
        return int(self._process.memory_info().rss)

    def reset(self) -> None:
        PROC_CLEAR_REFS.write_text(RESET_PEAK)
        self._mapped = self._process.memory_info().shared

    def peak(self) -> int:
        (line,) = [
            line for line in PROC_STATUS.read_text().splitlines() if line.startswith("VmHWM")
        ]
        # If there are fewer mapped pages than before, none are added: pages that were written
        # meanwhile no longer belong to a file, but were resident all the time.
        mapped = max(0, self._process.memory_info().shared - self._mapped)
        return int(line.split()[1]) * 1024 - mapped

    def close(self) -> None:
        pass


class _SampledGauge:
    """The resident set, sampled by a thread."""

    how = f"the resident set, sampled every {SAMPLE_SECONDS * 1e3:g} ms"

    def __init__(self) -> None:
        self._process = psutil.Process()
        # Locks sampling and comparing together, because a sample taken before a reset could
        # otherwise be stored after it and restore the old peak.
        self._lock = threading.Lock()
        self._highest = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def now(self) -> int:
        return int(self._process.memory_info().rss)

    def reset(self) -> None:
        with self._lock:
            self._highest = self.now()

    def peak(self) -> int:
        with self._lock:
            return max(self._highest, self.now())

    def close(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            with self._lock:
                self._highest = max(self._highest, self.now())
