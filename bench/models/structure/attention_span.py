"""Attention span (sliding window, layer types) from a model config."""

from __future__ import annotations

from torch import nn

from bench.models.network import text_config

# Layer types whose past is one key and value per token; others fold the past into a state.
ATTENTION_LAYERS = ("full_attention", "sliding_attention")


def non_attention_layer(network: nn.Module) -> str | None:
    """Return the first kind of layer that is not attention over tokens, or None."""
    # A recurrent or convolutional state has no mask that could hide one branch from another, so
    # such layers rule out prefix sharing. `_is_stateful` is how transformers marks models without
    # `layer_types` (Mamba and its kin).
    kinds = getattr(text_config(network), "layer_types", None) or ()
    others = sorted(set(kinds) - set(ATTENTION_LAYERS))
    if others:
        return str(others[0])
    return "recurrent state" if getattr(network, "_is_stateful", False) else None


def sliding_window(network: nn.Module) -> int | None:
    """Return the sliding window in tokens, or None if every layer sees the whole past."""
    config = text_config(network)
    size = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    # A config may carry `sliding_window` although no layer uses it: Qwen2 disables it by
    # `use_sliding_window`, hybrid models by layer type.
    slides = kinds is None or "sliding_attention" in kinds
    return int(size) if size and slides and getattr(config, "use_sliding_window", True) else None
