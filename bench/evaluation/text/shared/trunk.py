"""KV cache of a shared prefix: computed once, read by every sequence that follows it.

Suffixes: B sequences, G key-value heads, C tokens of the prefix, T tokens of a sequence, d width of
a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class LentLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """One layer's keys and values [1, G, C, d], put before those of each call and never changed."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the prefix's and the call's keys and values, [B, G, C + T, d]."""
        # The call's are not stored: any number of batches read the same prefix, and a sequence is
        # complete after one forward.
        return _after(self.keys, key_states), _after(self.values, value_states)


def growing(parent: Cache | None) -> Cache:
    """Return a cache that appends what a call adds to the contents of `parent`, left unchanged."""
    cache = DynamicCache()
    if parent is not None:
        for layer in parent.layers:
            cache.layers.append(DynamicLayer())
            # DynamicLayer appends by `cat`, which makes new tensors: the parent's are only read.
            cache.layers[-1].update(layer.keys, layer.values)
    return cache


def lent(cache: Cache) -> Cache:
    """Return a cache that any number of sequences may read and none changes."""
    return Cache(layers=[LentLayer(layer.keys, layer.values) for layer in cache.layers])


def _after(trunk_1GCd: Tensor, own_BGTd: Tensor) -> Tensor:
    # expand copies nothing; cat copies the prefix once per layer and batch, which is the price of
    # attention kernels that take their keys as one tensor.
    trunk_BGCd = trunk_1GCd.expand(own_BGTd.shape[0], -1, -1, -1)
    return torch.cat([trunk_BGCd, own_BGTd], dim=-2)
