"""How large a key-value cache is."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def held(cache: Any) -> int:
    """Return the bytes of all keys and values in a cache, text and visual alike."""
    tensors = {
        id(value): value
        for layer in cache.layers
        for name, value in vars(layer).items()
        if isinstance(value, Tensor) and name.endswith(("keys", "values"))
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
