"""What a network's config says about how far its layers look."""

from __future__ import annotations

from typing import Any

KNOWN = ("full_attention", "sliding_attention")
"""Layers whose past is keys and values by token; other layers mix the past into a state."""


def text_config(network: Any) -> Any:
    """Return the config of a network's language model."""
    config = network.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def foreign_layers(network: Any) -> str | None:
    """Return the first kind of layer that is not attention over tokens, None when all are."""
    kinds = getattr(text_config(network), "layer_types", None) or ()
    others = sorted(set(kinds) - set(KNOWN))
    if others:
        return str(others[0])
    return "recurrent state" if getattr(network, "_is_stateful", False) else None


def window(network: Any) -> int | None:
    """Return how many tokens the narrowest sliding layer looks back, None when none slides."""
    config = text_config(network)
    size = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    return int(size) if size and slides and getattr(config, "use_sliding_window", True) else None
