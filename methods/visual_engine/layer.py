"""One decoder layer on two streams: full work for text rows, reduced work for visual rows.

Shapes: B samples, T text rows, N visual rows, D d_model, h kept heads, V key-value heads that they
read, d a head's width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from bench.models.vlm.decoder_view import DecoderLayer
from methods.visual_engine.attention import (
    Rotary,
    StreamQKV,
    joint_attention,
    norm_and_rotate,
    split_heads,
    text_attention,
    text_only_attention,
    visual_attention,
)
from methods.visual_engine.kv_cache import CacheSelection, SplitCacheLayer
from methods.visual_engine.masks import AttentionMasks
from methods.visual_engine.selection_inputs import LayerQK
from methods.visual_engine.weight_slices import VisualWeights, project


@dataclass(frozen=True)
class CallContext:
    """Inputs that the layers of one stage share: masks, angles of both streams, the cache.

    `selection` are the cached visual tokens that are read; None means all.
    """

    masks: AttentionMasks
    text_rotary: Rotary
    visual_rotary: Rotary | None
    cache: DynamicCache | None
    selection: CacheSelection | None = None

    def of_kind(self, number: int, kinds: int) -> CallContext:
        """Return the inputs with the angles of one kind of layers, among `kinds` concatenated."""

        def own(rotary: Rotary) -> Rotary:
            cos, sin = (part.chunk(kinds, dim=-1)[number] for part in rotary)
            return cos, sin

        visual = None if self.visual_rotary is None else own(self.visual_rotary)
        return replace(self, text_rotary=own(self.text_rotary), visual_rotary=visual)

    def layer(self, index: int) -> SplitCacheLayer | None:
        """Return one layer's cache, if there is a cache."""
        if self.cache is None:
            return None
        layer: SplitCacheLayer = self.cache.layers[index]
        return layer


@dataclass
class Streams:
    """Hidden states of text rows [B, T, D] and of visual rows [B, N, D], None once removed.

    `last_qk` holds the queries and keys of the preceding layer if a pruning step will read them.
    """

    text_BTD: Tensor
    visual_BND: Tensor | None
    last_qk: LayerQK | None = None


def two_stream_layer(
    streams: Streams,
    layer: DecoderLayer,
    weights: VisualWeights,
    call: CallContext,
    *,
    last: bool,
    keep_qk: bool = False,
) -> Streams:
    """Run both streams through one layer.

    In the `last` layer that visual rows reach, only their keys and values are computed, since
    nothing else is read. With `keep_qk`, queries and keys are kept for the pruning step after the
    layer.
    """
    visual = streams.visual_BND
    text_in = layer.attention_norm(streams.text_BTD)
    text = _project_text(text_in, weights, call, layer.index)
    if visual is None:
        cache = call.layer(layer.index)
        cached = None if cache is None else cache.read_visual(call.selection)
        out_BHTd = text_attention(text, cached, weights, call.masks)
        last_qk = None
        if keep_qk and cached is not None:
            last_qk = LayerQK(layer.index, text, cached[0], weights, call.masks)
        return Streams(_finish_text(streams.text_BTD, text_in, out_BHTd, layer), None, last_qk)
    visual_in = layer.attention_norm(visual)
    own = _project_visual(visual_in, weights, call, last)
    visual_kv = _cache_visual(own, call.layer(layer.index)) if weights.heads.kept else None
    if last:
        out_BHTd = text_attention(text, visual_kv, weights, call.masks)
        return Streams(_finish_text(streams.text_BTD, text_in, out_BHTd, layer), None)
    out_BHTd, out_BhNd = _attend_streams(text, own, visual_kv, weights, call.masks)
    x_BND = visual + layer.attended(_project_output(out_BhNd, weights, visual))
    fed_BND = weights.feed_forward(layer.feed_forward_input(visual_in, x_BND))
    x_BND = x_BND + layer.fed_forward(fed_BND)
    last_qk = None
    if keep_qk:
        last_qk = LayerQK(
            layer.index, text, visual_kv[0] if visual_kv else None, weights, call.masks
        )
    return Streams(_finish_text(streams.text_BTD, text_in, out_BHTd, layer), x_BND, last_qk)


def upcoming_qk(
    streams: Streams, layer: DecoderLayer, weights: VisualWeights, call: CallContext
) -> LayerQK:
    """Return the queries and keys that rows would have in a layer, without caching them.

    Keys include those of earlier calls in the layer's cache.
    """
    view, cache = weights.view, call.layer(layer.index)
    text = layer.attention_norm(streams.text_BTD)
    q = norm_and_rotate(project(text, view.q), view, view.q_norm, call.text_rotary)
    k = norm_and_rotate(project(text, view.k), view, view.k_norm, call.text_rotary)
    visual = layer.attention_norm(cast(Tensor, streams.visual_BND))
    visual_k = None
    if weights.heads.kept:
        rotary = cast(Rotary, call.visual_rotary)
        visual_k = norm_and_rotate(project(visual, weights.k), view, view.k_norm, rotary)
        if cache is not None and cache.visual_keys is not None:
            visual_k = torch.cat([cache.visual_keys, visual_k], dim=2)
    if cache is not None and cache.is_initialized:
        k = torch.cat([cache.keys, k], dim=2)
    return LayerQK(layer.index, StreamQKV(q, k, k), visual_k, weights, call.masks)


def _project_text(
    x_BTD: Tensor, weights: VisualWeights, call: CallContext, index: int
) -> StreamQKV:
    view = weights.view
    q = norm_and_rotate(project(x_BTD, view.q), view, view.q_norm, call.text_rotary)
    k = norm_and_rotate(project(x_BTD, view.k), view, view.k_norm, call.text_rotary)
    v = split_heads(project(x_BTD, view.v), view.head_dim)
    if call.cache is not None:
        k, v = call.cache.update(k, v, index)
    return StreamQKV(q, k, v)


def _project_visual(
    x_BND: Tensor, weights: VisualWeights, call: CallContext, last: bool
) -> StreamQKV:
    """Project visual rows for the kept heads; no queries in the last layer."""
    view, rotary = weights.view, cast(Rotary, call.visual_rotary)
    q = None
    # With `dropped_heads=zero`, a layer without kept heads has an empty projection, which cannot be
    # split into heads.
    if not last and weights.q.weight.shape[0]:
        q = norm_and_rotate(project(x_BND, weights.q), view, view.q_norm, rotary)
    k = norm_and_rotate(project(x_BND, weights.k), view, view.k_norm, rotary)
    v = split_heads(project(x_BND, weights.v), view.head_dim)
    return StreamQKV(q, k, v)


def _cache_visual(own: StreamQKV, cache: SplitCacheLayer | None) -> tuple[Tensor, Tensor]:
    """Append the new visual keys and values to the cache; return all so far."""
    return (own.k, own.v) if cache is None else cache.add_visual(own.k, own.v)


def _attend_streams(
    text: StreamQKV,
    own: StreamQKV,
    visual_kv: tuple[Tensor, Tensor] | None,
    weights: VisualWeights,
    masks: AttentionMasks,
) -> tuple[Tensor, Tensor | None]:
    """Compute the attention of text rows, and of visual rows for the heads in `weights.q`.

    `visual_kv` holds keys and values of all visual tokens so far; None if no head is kept.
    """
    kept, parts = len(weights.heads.kept), []
    if visual_kv is None:
        out_BHTd = text_attention(text, None, weights, masks)
    else:
        q_BhNd = cast(Tensor, own.q)[:, :kept]
        if masks.order is not None:
            # `order` is set only in a first call, which has no keys of earlier calls.
            new = StreamQKV(q_BhNd, own.k, own.v)
            out_BHTd, out_BhNd = joint_attention(text, new, weights, masks)
        else:
            out_BHTd = text_attention(text, visual_kv, weights, masks)
            out_BhNd = visual_attention(text, StreamQKV(q_BhNd, *visual_kv), weights, masks)
        parts.append(out_BhNd)
    if own.q is not None and own.q.shape[1] > kept:
        parts.append(text_only_attention(text, own.q[:, kept:], weights, masks))
    return out_BHTd, torch.cat(parts, dim=1) if parts else None


def _project_output(out_BhNd: Tensor | None, weights: VisualWeights, visual: Tensor) -> Tensor:
    """Return what attention adds to visual rows, [B, N, D]."""
    if out_BhNd is not None:
        return project(out_BhNd.transpose(1, 2).flatten(2), weights.o)
    # Without heads the output projection is its bias, which masked mode adds as well.
    return torch.zeros_like(visual) if weights.o.bias is None else weights.o.bias.expand_as(visual)


def _finish_text(
    x_BTD: Tensor, normed_BTD: Tensor, out_BHTd: Tensor, layer: DecoderLayer
) -> Tensor:
    """Add attention and feed-forward to text rows, [B, T, D]; `normed` is attention's input."""
    # If a prompt is processed in chunks, a call may contain images and padding only.
    if not x_BTD.shape[1]:
        return x_BTD
    view = layer.attention_view()
    x_BTD = x_BTD + layer.attended(project(out_BHTd.transpose(1, 2).flatten(2), view.o))
    fed_BTD: Tensor = layer.feed_forward(layer.feed_forward_input(normed_BTD, x_BTD))
    return x_BTD + layer.fed_forward(fed_BTD)
