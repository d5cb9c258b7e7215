"""Size of a KV cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def held(cache: Any) -> int:
    """Return the bytes of all keys and values in a cache, for text and visual tokens."""
    # By attribute suffix, since the cache layer of a method holds `visual_keys` and `visual_values`
    # as well; by identity, since one tensor may be an attribute under two names.
    tensors = {
        id(value): value
        for layer in cache.layers
        for name, value in vars(layer).items()
        if isinstance(value, Tensor) and name.endswith(("keys", "values"))
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
