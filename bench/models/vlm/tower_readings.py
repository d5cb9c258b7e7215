"""What one pass through a vision tower tells of its visual tokens.

Shapes: I images (or tiles), S patches and the class token of one, P patches, V visual tokens in the
order in which they were encoded, c patches merged into a token, D tower width, H heads, d a head's
width, Q queries, F width of the features before the projector.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isqrt
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from bench.models.network import NetworkConfig
from bench.models.vlm.tower_pruning import spread

# Queries per chunk when the attention of all patches is needed: bounds the [H, Q, P] weights.
QUERY_CHUNK = 256

# Models whose tower prepends a class token to an image.
CLASS_TOKEN_MODELS = ("llava", "internvl")

# Arguments by keyword of the observed attention: positions, boundaries of frames.
AttentionArguments = dict[str, Any]


class ClassTokenAttention(Protocol):
    """Attention of a tower with a class token (CLIP, InternViT)."""

    num_heads: int
    scale: float
    q_proj: nn.Linear
    k_proj: nn.Linear


class PatchAttention(Protocol):
    """Attention of a tower without a class token (Qwen-VL)."""

    num_heads: int
    scaling: float
    qkv: nn.Linear


@dataclass
class TowerCall:
    """One pass through the tower: inputs of the observed attention and of the projector.

    `states` are the outputs of the observed layer where it has a class token, `layers` the inputs
    of attention in requested layers, by number. `places` [I, M] are those of the patches that are
    left of `patches`, where a method removes some inside the tower.
    """

    hidden: Tensor
    kwargs: AttentionArguments
    features: Tensor
    grids: Tensor | None
    states: Tensor | None = None
    layers: dict[int, Tensor] = field(default_factory=dict)
    places: Tensor | None = None
    patches: int = 0

    def whole(self, values: Tensor) -> Tensor:
        """Put values of the patches that are left [I, M, ...] at their places, [I, P, ...]."""
        return values if self.places is None else spread(values, self.places, self.patches)


def patches_per_token(config: NetworkConfig) -> int:
    """Return the number of patches that are merged into one visual token."""
    return _merge_side(config) ** 2


def _merge_side(config: NetworkConfig) -> int:
    """Return the side of the square of patches that are merged into one visual token."""
    if config.model_type in CLASS_TOKEN_MODELS:
        return round(1 / getattr(config, "downsample_ratio", 1))
    return int(config.vision_config.spatial_merge_size)


TowerReading = tuple[Tensor, Tensor, Tensor]


def read_class_token(config: NetworkConfig, module: nn.Module, call: TowerCall) -> TowerReading:
    """Read a tower whose first token is the class token; patches are a square in raster order."""
    attention = cast(ClassTokenAttention, module)
    heads, hidden_ISD = attention.num_heads, call.hidden
    # The attention of the class token is computed again, in float32: fused attention (SDPA, flash)
    # returns no weights, and eager attention would slow the whole tower for one layer's row. Only
    # its query is computed, so this costs S products per head instead of S².
    norms = [getattr(attention, f"{name}_norm", nn.Identity()) for name in "qk"]
    q_I1Hd = norms[0](attention.q_proj(hidden_ISD[:, :1])).unflatten(-1, (heads, -1))
    k_ISHd = norms[1](attention.k_proj(hidden_ISD)).unflatten(-1, (heads, -1))
    scores_IHS = torch.einsum("iqhd,ishd->ihs", q_I1Hd.float(), k_ISHd.float()) * attention.scale
    received_IS = scores_IHS.softmax(dim=-1).mean(dim=1)
    side = _merge_side(config)
    received_IP, keys_IPHd = call.whole(received_IS[:, 1:]), call.whole(k_ISHd[:, 1:])
    received_INc = by_token(received_IP, side)
    keys_INcHd = by_token(keys_IPHd, side)
    features_VF = call.whole(call.features).flatten(0, 1)
    return received_INc.sum(2).flatten(), keys_INcHd.mean(2).flatten(0, 1), features_VF


def by_token(x_IP: Tensor, merged: int) -> Tensor:
    """Group values of patches [I, P, ...] by token, [I, P / c, c, ...], with c = merged²."""
    side = isqrt(x_IP.shape[1])
    # Pixel shuffle (InternVL) merges squares of `merged` x `merged` patches; rows and columns are
    # split into (token, offset) and the two offsets brought together.
    grid: Tensor = x_IP.unflatten(1, (side // merged, merged, side // merged, merged))
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def read_patches(config: NetworkConfig, module: nn.Module, call: TowerCall) -> TowerReading:
    """Read a tower without a class token; the patches of a token are adjacent."""
    attention = cast(PatchAttention, module)
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    qkv = attention.qkv(call.hidden).unflatten(-1, (3, attention.num_heads, -1))
    q_PHd, k_PHd, _ = qkv.unbind(1)
    q_PHd, k_PHd = apply_rotary_pos_emb_vision(q_PHd, k_PHd, *call.kwargs["position_embeddings"])
    # The observed layer has full attention, so `cu_seqlens` delimits frames; in a windowed layer it
    # would delimit windows.
    lengths = call.kwargs["cu_seqlens"].diff().tolist()
    frames = zip(q_PHd.split(lengths), k_PHd.split(lengths), strict=True)
    received_P = torch.cat([_mean_received(q, k, attention.scaling) for q, k in frames])
    merged = patches_per_token(config)
    # Attention adds up over the patches of a token; keys are averaged, to stay keys.
    received_V = received_P.unflatten(0, (-1, merged)).sum(1)
    keys_VHd = k_PHd.unflatten(0, (-1, merged)).mean(1)
    features_VF = call.features.reshape(len(received_V), -1)
    if not hasattr(config.vision_config, "fullatt_block_indexes"):
        return received_V, keys_VHd, features_VF
    order_V = _raster_order(config.vision_config, cast(Tensor, call.grids))
    return received_V[order_V], keys_VHd[order_V], features_VF[order_V]


def mean_attention(q_IQD: Tensor, k_ISD: Tensor, heads: int, scale: float) -> Tensor:
    """Return the mean attention of some queries to each key, over queries and heads, [I, S]."""
    k_IHdS = k_ISD.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1).float()
    total_IS = torch.zeros(k_ISD.shape[:2], device=k_ISD.device)
    for q_ICD in q_IQD.split(QUERY_CHUNK, dim=1):
        q_IHCd = q_ICD.unflatten(-1, (heads, -1)).transpose(1, 2).float()
        total_IS += (q_IHCd @ k_IHdS * scale).softmax(dim=-1).mean(dim=1).sum(dim=1)
    return total_IS / q_IQD.shape[1]


def _mean_received(q_PHd: Tensor, k_PHd: Tensor, scaling: float) -> Tensor:
    """Return the mean attention that each patch of a frame receives, [P]."""
    k_HdP = k_PHd.permute(1, 2, 0).float()
    total_P = torch.zeros(len(k_PHd), device=k_PHd.device)
    for q_QHd in q_PHd.split(QUERY_CHUNK):
        weight_HQP = (q_QHd.transpose(0, 1).float() @ k_HdP * scaling).softmax(dim=-1)
        # Only the sum over queries is kept, so memory stays linear in the number of patches.
        total_P += weight_HQP.mean(dim=0).sum(dim=0)
    return total_P / len(q_PHd)


def _raster_order(vision: NetworkConfig, grids: Tensor) -> Tensor:
    """Return the raster order of tokens that Qwen2.5-VL sorts by windows, [V]."""
    from transformers.vision_utils import get_vision_window_index

    window_V, _ = get_vision_window_index(
        grids, vision.spatial_merge_size, vision.window_size, vision.patch_size
    )
    # Position i of the tower holds token window_V[i]; `argsort` inverts the permutation.
    order_V: Tensor = torch.as_tensor(window_V, device=grids.device).argsort()
    return order_V
