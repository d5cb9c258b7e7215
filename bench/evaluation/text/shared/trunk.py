"""Keys and values of a trunk: computed once, seen by every row that stands on it.

Suffixes: B rows, G key-value heads, C tokens of the trunk, T tokens of a row, d a head's width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class LentLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """One layer's keys and values [1, G, C, d], put before those of each call and not changed."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the trunk's and the call's, [B, G, C + T, d]; the call's are not kept."""
        return _after(self.keys, key_states), _after(self.values, value_states)


def growing(parent: Cache | None) -> Cache:
    """Return a cache that keeps what a call adds, after what is in `parent`, which stays."""
    cache = DynamicCache()
    if parent is not None:
        for layer in parent.layers:
            cache.layers.append(DynamicLayer())
            # Appending makes new tensors, so that the parent's are only read.
            cache.layers[-1].update(layer.keys, layer.values)
    return cache


def lent(cache: Cache) -> Cache:
    """Return a cache that any number of rows may read and none will change."""
    return Cache(layers=[LentLayer(layer.keys, layer.values) for layer in cache.layers])


def _after(trunk_1GCd: Tensor, own_BGTd: Tensor) -> Tensor:
    trunk_BGCd = trunk_1GCd.expand(own_BGTd.shape[0], -1, -1, -1)
    return torch.cat([trunk_BGCd, own_BGTd], dim=-2)
