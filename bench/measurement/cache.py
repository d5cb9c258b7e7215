"""Size of a KV cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def held(cache: Any) -> int:
    """Return the bytes of all keys and values in a cache, for text and visual tokens."""
    # By attribute suffix, since a method's cache layer keeps keys and values of visual tokens under
    # names of its own; by identity, since a tensor may be held under two names.
    tensors = {
        id(value): value
        for layer in cache.layers
        for name, value in vars(layer).items()
        if isinstance(value, Tensor) and name.endswith(("keys", "values"))
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
