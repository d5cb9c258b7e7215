"""A decoder as transformers runs it: every token through every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from bench.errors import UserError
from bench.measurement.analytic.layout import Layout
from bench.models.products import Product, attended, feed_forward, pair_macs, projections

ATTENTION = ("self_attn", "attention", "attn")
FEED_FORWARD = ("mlp", "block_sparse_moe", "feed_forward")


def decoder(layers: Sequence[nn.Module], config: Any, layout: Layout) -> Iterator[Product]:
    """Yield the products of all layers; `config` is the text part's.

    Raises:
        UserError: a layer has no attention or feed-forward that is understood.
    """
    if not layers:
        raise UserError("FLOPs by arithmetic need decoder layers, and the network has none")
    top_k = getattr(config, "num_experts_per_tok", None)
    for index, layer in enumerate(layers):
        attention, mlp = _part(layer, ATTENTION), _part(layer, FEED_FORWARD)
        per_pair, window = pair_macs(attention), _window(config, index)
        for rows, places in layout.kinds():
            count = layout.batch * len(places)
            past = layout.batch * layout.past
            keys = layout.keys if window is None or not layout.past else min(layout.keys, window)
            yield projections(attention, count, past, rows)
            yield attended(rows, count * keys, layout.seen(places, window), per_pair)
            yield from feed_forward(mlp, count, rows, top_k)


def head(network: nn.Module, rows: int) -> Product:
    """Return the language-modelling head for so many rows.

    Raises:
        UserError: the network has none.
    """
    embeddings = getattr(network, "get_output_embeddings", lambda: None)()
    if not isinstance(embeddings, nn.Linear):
        raise UserError(f"{type(network).__name__} has no linear head whose FLOPs are known")
    return Product("head", float(rows * embeddings.in_features * embeddings.out_features))


def text_config(network: nn.Module) -> Any:
    """Return the config of the language part."""
    config: Any = network.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _part(layer: nn.Module, names: Sequence[str]) -> nn.Module:
    """Return the part of a layer that has one of the names."""
    found = (getattr(layer, name, None) for name in names)
    part = next((each for each in found if isinstance(each, nn.Module)), None)
    if part is None:
        raise UserError(
            f"FLOPs of {type(layer).__name__} are not known by arithmetic: it has none of "
            f"{', '.join(names)}"
        )
    return part


def _window(config: Any, index: int) -> int | None:
    """Return the sliding window of a layer, None where it attends to everything before."""
    window: int | None = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is not None and types[index] != "sliding_attention":
        return None
    return window
