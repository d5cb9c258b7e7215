"""Choice of a device and dtype, seeds, threads, memory in use, description, and device clocks.

No other module tests whether there is a GPU. README lists which CUDA code paths have run on one.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, pairwise, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import psutil

from bench.errors import UserError, unknown_name

# torch is imported inside functions, because launchers import this module for `visible_gpus` and
# must not load torch.
if TYPE_CHECKING:
    import torch
    from torch import nn

DTYPES = ("float32", "bfloat16", "float16")
NVIDIA_SMI_SECONDS = 30
"""Timeout of nvidia-smi, which takes seconds per GPU without persistence mode."""


class DeviceFacts(TypedDict):
    """Hardware and software facts of a record; `cuda` is None on a machine without a GPU."""

    platform: str
    python: str
    cpu: str
    cores: int | None
    threads: int
    memory_bytes: int
    gpus: list[str]
    cuda: str | None


def select_device(wanted: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UserError: `wanted` is none of these, or the machine does not have the device.
    """
    import torch

    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", wanted):
        raise unknown_name("model.device", wanted, ("auto", "cpu", "cuda", "cuda:N"))
    if wanted.startswith("cuda"):
        index = int(wanted.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise UserError(f"model.device={wanted}: this machine has {count} CUDA devices")
    return torch.device(wanted)


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as spelled in CUDA_VISIBLE_DEVICES."""
    # nvidia-smi instead of torch.cuda: CUDA reads CUDA_VISIBLE_DEVICES once, at initialisation.
    # After that a process can neither fork workers that use CUDA nor be restricted to one GPU.
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        # CUDA stops at the first invalid entry: `0,-1,1` makes only GPU 0 visible.
        return list(takewhile(lambda name: name.strip() not in ("", "-1"), listed.split(",")))
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=index", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=False
        )
    except (subprocess.TimeoutExpired, OSError):
        # If the driver hangs, no job can use a GPU, but jobs on the CPU still can run.
        return []
    return answer.stdout.split() if answer.returncode == 0 else []


def select_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype; `auto` is bfloat16 on a GPU and float32 on a CPU.

    Raises:
        UserError: `wanted` is neither `auto` nor one of `DTYPES`.
    """
    import torch

    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if wanted not in DTYPES:
        raise unknown_name("model.dtype", wanted, ("auto", *DTYPES))
    chosen = getattr(torch, wanted)
    assert isinstance(chosen, torch.dtype)
    return chosen


def check_attention(name: str) -> None:
    """Raise `UserError`, with the cure, if an attention implementation does not run here."""
    if name != "flash_attention_2":
        return
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        raise UserError(
            f"model.attention={name} needs an NVIDIA or AMD GPU and the package flash-attn: "
            "install it (pip install flash-attn), or set model.attention=sdpa"
        )


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices), so that a run is reproducible."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # numpy's global generator takes only 32 bits.
    torch.manual_seed(seed)


@contextmanager
def generators_restored() -> Iterator[None]:
    """Restore the global generators of Python, numpy and torch at the end of the block.

    Generators of libraries that are not imported yet have not been used.
    """
    plain, numpy, torch = random.getstate(), sys.modules.get("numpy"), sys.modules.get("torch")
    of_numpy = numpy.random.get_state() if numpy else None
    of_torch = torch.get_rng_state() if torch else None
    cuda = torch is not None and torch.cuda.is_initialized()
    of_cuda = torch.cuda.get_rng_state_all() if torch and cuda else None
    try:
        yield
    finally:
        random.setstate(plain)
        if numpy and of_numpy is not None:
            numpy.random.set_state(of_numpy)
        if torch and of_torch is not None:
            torch.set_rng_state(of_torch)
        if torch and of_cuda is not None:
            torch.cuda.set_rng_state_all(of_cuda)


def set_threads(count: int | None) -> None:
    """Let torch use `count` CPU threads; None keeps torch's own choice."""
    import torch

    if count is not None:
        torch.set_num_threads(count)


@contextmanager
def threads_set(count: int | None) -> Iterator[None]:
    """Set the number of threads inside the block only; see `set_threads`."""
    import torch

    before = torch.get_num_threads()
    set_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work; a no-op on a CPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Return cached, unused memory of torch's allocator to the device."""
    import torch

    # Tensors in reference cycles keep their blocks, while `empty_cache` frees only unused ones.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def trim_heap(device: torch.device) -> None:
    """Return freed memory to the system, so that a reading shows the memory in use."""
    # glibc keeps freed memory resident, so a peak that fits into it would not change the resident
    # set. On a GPU this is not needed, because the allocator counts memory of tensors instead of
    # cached memory.
    gc.collect()
    if device.type != "cuda" and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # Absent in musl.
            trim(0)


def free_bytes(device: torch.device) -> int:
    """Return the number of free bytes on the device.

    On a GPU, blocks that torch's allocator caches do not count as free: call
    `release_memory` first.
    """
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def total_bytes(device: torch.device) -> int:
    """Return the memory of the device in bytes, free or not."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


TOLERATED_GROWTH = 256 * 2**20
"""Bytes that may remain: imported modules, allocator reserves, caches of libraries."""

# oneDNN compiles one kernel per shape and keeps the last 1,024. Batches of experts have many
# lengths: 2,400 of them left 1.1 GiB, and 1,000 more added nothing. torch does not export the
# functions that empty this cache.
KERNEL_CACHE = 1536 * 2**20
"""Bytes that kernels for 16-bit products on a CPU may occupy in addition."""


class LeakMonitor:
    """Compares the memory in use, less the network's own, with that at construction."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._device = device
        # Existing garbage is collected first, because freeing it later would hide a leak.
        trim_heap(device)
        self._before = self._used() - network_bytes(network)

    def leaked_bytes(self, network: nn.Module) -> int:
        """Return how many more bytes are in use now, or 0 if the growth is tolerable."""
        # Collecting garbage is slow, so it is done only if there seems to be a leak.
        if self._growth(network) > TOLERATED_GROWTH:
            trim_heap(self._device)
        growth = self._growth(network)
        if growth <= TOLERATED_GROWTH:
            return 0
        half = any(each.is_floating_point() and each.itemsize == 2 for each in network.parameters())
        kernels = KERNEL_CACHE if half and self._device.type == "cpu" else 0
        return growth if growth > TOLERATED_GROWTH + kernels else 0

    def _growth(self, network: nn.Module) -> int:
        return self._used() - network_bytes(network) - self._before

    def _used(self) -> int:
        """Return the allocated bytes of a GPU, or the private resident bytes of the process."""
        import torch

        if self._device.type == "cuda":
            return int(torch.cuda.memory_allocated(self._device))
        # Shared pages are of mapped files, such as weights, which the kernel can drop.
        memory = psutil.Process().memory_info()
        return int(memory.rss - getattr(memory, "shared", 0))


def network_bytes(network: nn.Module) -> int:
    """Return the bytes of a network's parameters and buffers, without those on the meta device."""
    tensors = chain(network.parameters(), network.buffers())
    return sum(each.numel() * each.element_size() for each in tensors if not each.is_meta)


def describe_device() -> DeviceFacts:
    """Return the facts about this machine for a record."""
    import torch

    gpus = gpu_names()
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
    }


def gpu_names() -> list[str]:
    """Return the name of each GPU that torch sees; torch is imported only if there is a driver."""
    # Device files of NVIDIA's and AMD's drivers, and of Windows' driver for Linux.
    drivers = (path for name in ("nvidia*", "kfd", "dxg") for path in Path("/dev").glob(name))
    if sys.platform == "linux" and not any(drivers):
        return []
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def processor_name() -> str:
    """Return the processor's name, or its architecture if the system does not state it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []  # Not on Linux.
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


class Clock:
    """A series of marks; the device finishes all earlier work before the first one.

    On a GPU a mark is a CUDA event in the current stream. Recording it does not synchronise, so
    timing does not slow the work down, and the times are the device's own. On a CPU a mark is a
    reading of `perf_counter`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._seconds: list[float] = []
        synchronize(device)

    def mark(self) -> None:
        """Set a mark after all work queued on the device so far."""
        if self._device.type != "cuda":
            self._seconds.append(time.perf_counter())
            return
        import torch

        # A CUDA call returns before its kernels have run, so `perf_counter` would time the
        # launches.
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)

    def laps(self) -> list[float]:
        """Wait for the device and return the seconds from each mark to the next."""
        # `elapsed_time` raises unless both events have completed.
        synchronize(self._device)
        if self._device.type != "cuda":
            return [after - before for before, after in pairwise(self._seconds)]
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._events)]


def call_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, until the device has finished its work."""
    clock = Clock(device)
    clock.mark()
    result = call()
    clock.mark()
    (seconds,) = clock.laps()
    # After the last mark, because freeing the result's memory is not part of the call.
    del result
    return seconds
