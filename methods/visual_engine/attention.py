"""Attention of text rows and visual rows computed separately, in one layer.

Shapes: B samples, T text rows, N visual rows and S tokens of the call, P and M text and visual
tokens of earlier calls, D d_model, H query heads, h kept, G key-value heads, V read by kept heads,
d a head's width, R rows of any stream.

Text queries of dropped heads attend to text only, those of kept heads to visual and text keys.
Visual queries exist for kept heads only. Each softmax runs over the attended keys only; products
with dropped keys are not computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.models.vlm.decoder_view import AttentionView
from methods.visual_engine.masks import AttentionMasks
from methods.visual_engine.weight_slices import VisualWeights

Rotary = tuple[Tensor, Tensor]  # cos and sin, each [B, R, up to d]


@dataclass(frozen=True)
class StreamQKV:
    """Queries, keys and values of one stream, [B, heads, rows, d] each; `q` may be absent."""

    q: Tensor | None
    k: Tensor
    v: Tensor


def angles_of_kinds(
    rotary: nn.Module, x_BSD: Tensor, kinds: Sequence[str], positions: Tensor
) -> Rotary:
    """Return cos and sin at the given positions, concatenated over all kinds of layers."""
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        found = [rotary(x_BSD, positions, kind) for kind in kinds]
    else:
        # Cohere 2 rotates only in layers with a window; for other layers the angle is zero.
        turn: Rotary = rotary(x_BSD, positions)
        none = torch.ones_like(turn[0]), torch.zeros_like(turn[1])
        found = [turn if kind == "sliding_attention" else none for kind in kinds]
    cos, sin = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    return cos, sin


def split_heads(x_BRE: Tensor, width: int) -> Tensor:
    """Split rows into heads, [B, heads, R, d]."""
    x_BRHd: Tensor = x_BRE.unflatten(-1, (-1, width))
    return x_BRHd.transpose(1, 2)


def apply_rotary(x_BHRd: Tensor, rotary: Rotary, *, interleaved: bool = False) -> Tensor:
    """Apply rotary embeddings to the two halves of each head, or to adjacent pairs.

    Components beyond the width of the angles are not rotated.
    """
    cos, sin = (part[:, None] for part in rotary)
    # With partial rotary embeddings (Phi-3 family) the angles are narrower than a head.
    turned, kept = x_BHRd.split([cos.shape[-1], x_BHRd.shape[-1] - cos.shape[-1]], dim=-1)
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
        across = torch.stack([-second, first], dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        across = torch.cat([-second, first], dim=-1)
    turned = turned * cos + across * sin
    return torch.cat([turned, kept], dim=-1) if kept.shape[-1] else turned


def norm_and_rotate(
    x_BRE: Tensor, view: AttentionView, norm: torch.nn.Module | None, rotary: Rotary
) -> Tensor:
    """Split projected queries or keys into heads, normalise and rotate them, [B, heads, R, d]."""
    x_BRHd = x_BRE.unflatten(-1, (-1, view.head_dim))
    if norm is not None:
        x_BRHd = norm(x_BRHd)
    return apply_rotary(x_BRHd.transpose(1, 2), rotary, interleaved=view.interleaved)


def attend(
    q_BHQd: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    *,
    causal: bool = False,
) -> Tensor:
    """Compute softmax(q kᵀ · scaling + mask) v with PyTorch's fused kernel, [B, H, Q, d]."""
    return functional.scaled_dot_product_attention(
        q_BHQd, k, v, attn_mask=mask, is_causal=causal, scale=scaling
    )


def text_attention(
    text: StreamQKV,
    visual: tuple[Tensor, Tensor] | None,
    weights: VisualWeights,
    masks: AttentionMasks,
) -> Tensor:
    """Compute the attention of text rows, [B, H, T, d], with heads in the network's order.

    `visual` holds keys and values of all visual tokens so far, [B, V, M + N, d], or None.
    """
    heads, scaling = weights.heads, weights.view.scaling
    q_BHTd = cast(Tensor, text.q)
    parts = []
    if heads.kept and visual is not None:
        k = torch.cat(
            [
                select_heads(visual[0], heads.reads),
                kv_heads_for(text.k, heads.kept, heads.per_group),
            ],
            2,
        )
        v = torch.cat(
            [
                select_heads(visual[1], heads.reads),
                kv_heads_for(text.v, heads.kept, heads.per_group),
            ],
            2,
        )
        parts.append(attend(select_heads(q_BHTd, heads.kept), k, v, masks.mixed_BTK, scaling))
    # Without visual keys, or without kept heads, all heads attend to text only.
    # `restore_head_order` expects the order (kept, dropped).
    alone = heads.dropped if parts else (*heads.kept, *heads.dropped)
    if alone:
        k = kv_heads_for(text.k, alone, heads.per_group)
        v = kv_heads_for(text.v, alone, heads.per_group)
        parts.append(
            attend(select_heads(q_BHTd, alone), k, v, masks.text_BTK, scaling, causal=masks.causal)
        )
    return restore_head_order(parts, heads.restore)


def visual_attention(
    text: StreamQKV, visual: StreamQKV, weights: VisualWeights, masks: AttentionMasks
) -> Tensor:
    """Compute the attention of visual rows in kept heads, [B, h, N, d].

    `visual` has the call's own queries and the keys and values of all visual tokens so far.
    """
    heads, scaling = weights.heads, weights.view.scaling
    k_visual, v_visual = select_heads(visual.k, heads.reads), select_heads(visual.v, heads.reads)
    k_text = kv_heads_for(text.k, heads.kept, heads.per_group)
    v_text = kv_heads_for(text.v, heads.kept, heads.per_group)
    q_BhNd = cast(Tensor, visual.q)
    outputs = []
    for block in masks.blocks:
        samples, n_text = block.samples, block.text_keys
        k = torch.cat([k_visual[samples, :, block.keys], k_text[samples, :, :n_text]], dim=2)
        v = torch.cat([v_visual[samples, :, block.keys], v_text[samples, :, :n_text]], dim=2)
        outputs.append(attend(q_BhNd[samples, :, block.queries], k, v, block.mask, scaling))
    # Without a window or with few rows, one block covers everything and needs no copy.
    if len(outputs) == 1 and outputs[0].shape == q_BhNd.shape:
        return outputs[0]
    out_BhNd = torch.zeros_like(q_BhNd)
    for block, part in zip(masks.blocks, outputs, strict=True):
        out_BhNd[block.samples, :, block.queries] = part
    return out_BhNd


def joint_attention(
    text: StreamQKV, visual: StreamQKV, weights: VisualWeights, masks: AttentionMasks
) -> tuple[Tensor, Tensor]:
    """Compute the attention of both streams in kept heads, in plain causal order.

    This is one causal attention over the [text | visual] rows in the call's order, without a mask.
    """
    heads, scaling = weights.heads, weights.view.scaling
    order = cast(Tensor, masks.order)
    q_text = cast(Tensor, text.q)
    streams = (
        (select_heads(q_text, heads.kept), cast(Tensor, visual.q)),
        (kv_heads_for(text.k, heads.kept, heads.per_group), select_heads(visual.k, heads.reads)),
        (kv_heads_for(text.v, heads.kept, heads.per_group), select_heads(visual.v, heads.reads)),
    )
    # Sorting copies the rows once, which is cheaper than a mask: with a mask, SDPA also computes
    # the pairs above the diagonal, and cannot use its flash kernel on a GPU.
    q, k, v = (torch.cat(pair, dim=2).index_select(2, order) for pair in streams)
    joint = attend(q, k, v, None, scaling, causal=True).index_select(2, order.argsort())
    rows = q_text.shape[2]
    parts = [joint[:, :, :rows]]
    if heads.dropped:
        k = kv_heads_for(text.k, heads.dropped, heads.per_group)
        v = kv_heads_for(text.v, heads.dropped, heads.per_group)
        parts.append(attend(select_heads(q_text, heads.dropped), k, v, None, scaling, causal=True))
    return restore_head_order(parts, heads.restore), joint[:, :, rows:]


def text_only_attention(
    text: StreamQKV, q_BHNd: Tensor, weights: VisualWeights, masks: AttentionMasks
) -> Tensor:
    """Compute the attention of visual rows to text in dropped heads, [B, H - h, N, d].

    Used under `dropped_heads=text_only`. Rows with no text before them get zero.
    """
    heads = weights.heads
    before = cast(Tensor, masks.before_BNK)
    # Some kernels return NaN for a softmax over no keys, and NaN times 0 is NaN. Rows without text
    # before them therefore attend to all text and are zeroed afterwards.
    any_text = before.any(dim=-1, keepdim=True)
    k = kv_heads_for(text.k, heads.dropped, heads.per_group)
    v = kv_heads_for(text.v, heads.dropped, heads.per_group)
    return attend(q_BHNd, k, v, before | ~any_text, weights.view.scaling) * any_text


def restore_head_order(parts: Sequence[Tensor], restore: Tensor | None) -> Tensor:
    """Reorder heads computed as (kept, dropped) into the network's order."""
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
    return whole if restore is None else whole.index_select(1, restore)


def select_heads(x_BHRd: Tensor, heads: Sequence[int]) -> Tensor:
    """Select heads, which may repeat; the result is a view if they are consecutive."""
    # Kept heads are consecutive once the weights are reordered, so the usual case copies nothing.
    count = len(heads)
    if count and tuple(heads) == tuple(range(heads[0], heads[0] + count)):
        return x_BHRd[:, heads[0] : heads[0] + count]
    return x_BHRd.index_select(1, torch.tensor(heads, device=x_BHRd.device, dtype=torch.int64))


def kv_heads_for(x_BGRd: Tensor, heads: Sequence[int], per_group: int) -> Tensor:
    """Select the key-value head that each of these query heads reads (grouped-query attention)."""
    return select_heads(x_BGRd, [head // per_group for head in heads])
