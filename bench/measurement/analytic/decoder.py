"""Analytic cost of a decoder as transformers runs it: every token passes every layer."""

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
    """Yield the multiply-adds of all layers; `config` is that of the language part.

    Raises:
        UserError: there are no layers, or a layer has no known attention or feed-forward.
    """
    if not layers:
        raise UserError("no analytic FLOP formula: the network has no decoder layers")
    top_k = getattr(config, "num_experts_per_tok", None)
    for index, layer in enumerate(layers):
        attention, mlp = _part(layer, ATTENTION), _part(layer, FEED_FORWARD)
        per_pair, window = pair_macs(attention), _window(config, index)
        for rows, places in layout.kinds():
            count = layout.batch * len(places)
            past = layout.batch * layout.past
            # A prefill charges the full Q x K rectangle even under a sliding window, because the
            # kernel is called with it. In decoding, the cache of a sliding-window layer has been
            # cropped to the window, so the kernel receives no more keys than that.
            keys = layout.keys if window is None or not layout.past else min(layout.keys, window)
            yield projections(attention, count, past, rows)
            yield attended(rows, count * keys, layout.seen(places, window), per_pair)
            yield from feed_forward(mlp, count, rows, top_k)


def head(network: nn.Module, rows: int) -> Product:
    """Return the multiply-adds of the language-modelling head for `rows` hidden states.

    Raises:
        UserError: the network has no linear head.
    """
    embeddings = getattr(network, "get_output_embeddings", lambda: None)()
    if not isinstance(embeddings, nn.Linear):
        raise UserError(f"no analytic FLOP formula for the head of {type(network).__name__}")
    # From the shape, not from the stored weights: a head tied to the embeddings multiplies too.
    return Product("head", float(rows * embeddings.in_features * embeddings.out_features))


def text_config(network: nn.Module) -> Any:
    """Return the config of the language part, which is the whole config of a text-only model."""
    config: Any = network.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _part(layer: nn.Module, names: Sequence[str]) -> nn.Module:
    found = (getattr(layer, name, None) for name in names)
    part = next((each for each in found if isinstance(each, nn.Module)), None)
    if part is None:
        raise UserError(
            f"no analytic FLOP formula for {type(layer).__name__}: expected one of the submodules "
            f"{', '.join(names)}"
        )
    return part


def _window(config: Any, index: int) -> int | None:
    """Return the sliding window of a layer, or None if it attends to all earlier tokens."""
    window: int | None = getattr(config, "sliding_window", None)
    # Models that mix both kinds of attention list the kind per layer; the others, such as Mistral,
    # apply `sliding_window` to every layer.
    types = getattr(config, "layer_types", None)
    if types is not None and types[index] != "sliding_attention":
        return None
    return window
