"""Memory that a method fails to release, which would exhaust the machine in a long sweep."""

from __future__ import annotations

from itertools import chain

import psutil
import torch
from torch import nn

from bench.device import release

UNNOTICED = 256 * 2**20
"""Bytes that may remain: imported modules, allocator reserves, caches of libraries."""


class Watch:
    """Records memory in use at construction, less the network's own; `left` returns the growth."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._device = device
        self._before = self._used() - _bytes(network)

    def left(self, network: nn.Module) -> int:
        """Return how many more bytes are in use now, or 0 if the growth is tolerable."""
        # Collecting garbage is slow, so it is done only if there seems to be a leak.
        if self._grown(network) > UNNOTICED:
            release(self._device)
        grown = self._grown(network)
        return grown if grown > UNNOTICED else 0

    def _grown(self, network: nn.Module) -> int:
        return self._used() - _bytes(network) - self._before

    def _used(self) -> int:
        """Return the allocated bytes of a GPU, or the private resident bytes of the process."""
        if self._device.type == "cuda":
            return int(torch.cuda.memory_allocated(self._device))
        # Shared pages are mapped files, such as weights read by mmap: the kernel can drop them.
        held = psutil.Process().memory_info()
        return int(held.rss - getattr(held, "shared", 0))


def _bytes(network: nn.Module) -> int:
    held = chain(network.parameters(), network.buffers())
    return sum(t.numel() * t.element_size() for t in held if not t.is_meta)
