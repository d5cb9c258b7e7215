"""Memory of a model at work, and what a method fails to give back."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import psutil
import torch
from torch import nn

from bench.device.devices import release_memory
from bench.device.memory import PeakMemory
from bench.measurement.model_size import kv_cache_bytes, tensor_bytes
from bench.measurement.quantities import DECODE, FORWARD, PREFILL, Measurements
from bench.measurement.workload import GenerationWorkload, Workload
from bench.records.record import Cost

if TYPE_CHECKING:
    from bench.models.model import Model


@torch.no_grad()
def memory_costs(model: Model, work: Workload) -> Measurements:
    """Yield the peak memory of each stage and the size of the KV cache, from separate calls.

    A peak is the size of the weights plus what the call allocated on top of the memory in use
    before it, as if the model were alone: the dense model loaded next to it does not count.
    """
    inputs, network = work.on(model.device), model.network
    if not isinstance(work, GenerationWorkload):
        with PeakMemory(model.device) as peak:
            work.forward(network, inputs)
        yield _peak_cost(network, f"{FORWARD} {work.shape}", peak)
        return
    with PeakMemory(model.device) as peak:
        output = work.forward(network, inputs)
    prefill, decode = f"{PREFILL} {work.shape}", f"{DECODE} {work.shape}"
    yield _peak_cost(network, prefill, peak)
    filled = kv_cache_bytes(output.past_key_values)
    # The cache of the prefill must be gone before the next baseline is taken.
    del output
    with PeakMemory(model.device) as peak:
        # Restart after the first token, so that the peak of the prefill is not charged to decoding.
        cache = work.generate(network, inputs, lambda n: peak.restart() if n == 1 else None)
    yield _peak_cost(network, decode, peak)
    yield Cost(scope=prefill, quantity="cache_bytes", unit="B", value=filled, how="counted")
    # The last generated token is never fed back, so the cache grows by new_tokens - 1.
    each = (kv_cache_bytes(cache) - filled) / (work.new_tokens - 1) / work.batch
    yield Cost(scope=decode, quantity="cache_bytes_per_token", unit="B", value=each, how="counted")


def disk_bytes(network: nn.Module) -> int:
    """Return the bytes of the weights in safetensors files, with tied weights counted once."""
    # Tied tensors share storage; empty and meta tensors have no address, so they go by identity.
    kept = {
        (tensor.data_ptr() if tensor.numel() and not tensor.is_meta else id(tensor)): tensor
        for tensor in network.state_dict(keep_vars=True).values()
    }
    return tensor_bytes(kept.values())


def _peak_cost(network: nn.Module, scope: str, peak: PeakMemory) -> Cost:
    weights = tensor_bytes((*network.parameters(), *network.buffers()))
    parts = {"weights": float(weights), "above": float(peak.above)}
    return Cost(
        scope=scope,
        quantity="peak_bytes",
        unit="B",
        value=weights + peak.above,
        how="measured",
        parts=parts,
        note=peak.how,
    )


TOLERATED_GROWTH = 256 * 2**20
"""Bytes that may remain: imported modules, allocator reserves, caches of libraries."""


class LeakMonitor:
    """Compares the memory in use, less the network's own, with that at construction."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._device = device
        self._before = self._used() - _network_bytes(network)

    def leaked_bytes(self, network: nn.Module) -> int:
        """Return how many more bytes are in use now, or 0 if the growth is tolerable."""
        # Collecting garbage is slow, so it is done only if there seems to be a leak.
        if self._growth(network) > TOLERATED_GROWTH:
            release_memory(self._device)
        growth = self._growth(network)
        return growth if growth > TOLERATED_GROWTH else 0

    def _growth(self, network: nn.Module) -> int:
        return self._used() - _network_bytes(network) - self._before

    def _used(self) -> int:
        """Return the allocated bytes of a GPU, or the private resident bytes of the process."""
        if self._device.type == "cuda":
            return int(torch.cuda.memory_allocated(self._device))
        # Shared pages are mapped files, such as weights read by mmap: the kernel can drop them.
        memory = psutil.Process().memory_info()
        return int(memory.rss - getattr(memory, "shared", 0))


def _network_bytes(network: nn.Module) -> int:
    tensors = chain(network.parameters(), network.buffers())
    return tensor_bytes(tensor for tensor in tensors if not tensor.is_meta)
