"""Memory that a method does not give back, which a long sweep would run out of."""

from __future__ import annotations

from itertools import chain

import psutil
import torch
from torch import nn

from bench.device import release

UNNOTICED = 256 * 2**20
"""Bytes that may stay: imports, allocators' reserves, a library's caches."""


class Watch:
    """Memory in use when it is made, apart from a network's own; `left` says what came on top."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._device = device
        self._before = self._used() - _bytes(network)

    def left(self, network: nn.Module) -> int:
        """Return how many bytes more are in use now, 0 if it is not worth a word."""
        if self._grown(network) > UNNOTICED:
            release(self._device)
        grown = self._grown(network)
        return grown if grown > UNNOTICED else 0

    def _grown(self, network: nn.Module) -> int:
        return self._used() - _bytes(network) - self._before

    def _used(self) -> int:
        """Return the device's allocated bytes, or the process's own that are not mapped files."""
        if self._device.type == "cuda":
            return int(torch.cuda.memory_allocated(self._device))
        held = psutil.Process().memory_info()
        return int(held.rss - getattr(held, "shared", 0))


def _bytes(network: nn.Module) -> int:
    held = chain(network.parameters(), network.buffers())
    return sum(t.numel() * t.element_size() for t in held if not t.is_meta)
