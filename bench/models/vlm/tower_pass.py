"""One pass through a vision tower: removal of patches between layers, and values read from it.

Patches are removed only from CLIP in LLaVA, where a patch is a token.

Shapes: I images (or tiles) of a call, S rows per image (the class token and its patches), P patches
per image, M remaining patches, V visual tokens in order of encoding, c patches merged into a token,
D tower width, H heads, d a head's width, Q queries, F width of the features before the projector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isqrt
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from bench.models.network import NetworkConfig

# Queries per chunk when the attention of all patches is needed, to limit the [H, Q, P] weights.
QUERY_CHUNK = 256

# Models whose towers prepend a class token to an image.
CLASS_TOKEN_MODELS = ("llava", "internvl")

# Keyword arguments of the observed attention: positions, boundaries of frames.
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

    `states` are the outputs of the observed layer if there is a class token, `layers` the inputs of
    attention in requested layers, by number. If a method removes patches inside the tower, `places`
    [I, M] are the positions of the remaining ones among `patches`.
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
        """Scatter values of the remaining patches [I, M, ...] to their positions, [I, P, ...]."""
        return values if self.places is None else spread(values, self.places, self.patches)


def patches_per_token(config: NetworkConfig) -> int:
    """Return the number of patches that are merged into one visual token."""
    return _merge_side(config) ** 2


def _merge_side(config: NetworkConfig) -> int:
    """Return the side of the square of patches that is merged into one visual token."""
    if config.model_type in CLASS_TOKEN_MODELS:
        return round(1 / getattr(config, "downsample_ratio", 1))
    return int(config.vision_config.spatial_merge_size)


TowerReading = tuple[Tensor, Tensor, Tensor]


def read_class_token(config: NetworkConfig, module: nn.Module, call: TowerCall) -> TowerReading:
    """Read a tower whose first token is the class token; patches are a square in raster order."""
    attention = cast(ClassTokenAttention, module)
    heads, hidden_ISD = attention.num_heads, call.hidden
    # The class token's attention is recomputed in float32: fused attention (SDPA, flash) returns no
    # weights, and eager attention would slow down the whole tower for one row of one layer. Only
    # one query is computed, so this takes S products per head instead of S².
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
    # Pixel shuffle (InternVL) merges squares of `merged` x `merged` patches: rows and columns are
    # split into (token, offset), and both offsets are moved together.
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
    # Attention is summed over the patches of a token, keys are averaged.
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
        # Only the sum over queries is stored, so memory is linear in the number of patches.
        total_P += weight_HQP.mean(dim=0).sum(dim=0)
    return total_P / len(q_PHd)


def _raster_order(vision: NetworkConfig, grids: Tensor) -> Tensor:
    """Return the raster order [V] of tokens that Qwen2.5-VL sorts by windows."""
    from transformers.vision_utils import get_vision_window_index

    window_V, _ = get_vision_window_index(
        grids, vision.spatial_merge_size, vision.window_size, vision.patch_size
    )
    # Position i of the tower contains token window_V[i]; `argsort` inverts the permutation.
    order_V: Tensor = torch.as_tensor(window_V, device=grids.device).argsort()
    return order_V


@dataclass(frozen=True)
class TowerRows:
    """Values that one layer of the tower computed for its rows, before any is removed.

    `until` is the number of following layers up to the last one after which patches may be removed.
    `patches` is the initial number P per image. `query_IHd` is the class token's scaled query;
    `keys_ISHd` and `values_ISHd` are those of all rows. `valid_IM` marks real patches as opposed to
    padding, because images of a call may have different numbers of remaining patches.
    """

    until: int
    patches: int
    query_IHd: Tensor
    keys_ISHd: Tensor
    values_ISHd: Tensor
    valid_IM: Tensor


# Takes a layer's rows, and the scores of their patches after the previous layer [I, M] or None.
# Returns their new scores [I, M] and the number of patches to keep per image [I].
RankPatches = Callable[[TowerRows, Tensor | None], tuple[Tensor, Tensor]]


class TowerPruning:
    """Removes the patches with the lowest scores after each of a tower's first layers.

    `last` is the last layer after which patches are removed; then every image has the same number
    of patches. The others keep their order. After the projector they are back at their original
    positions and the removed ones are zero, which later code must drop.
    """

    def __init__(
        self, layers: Sequence[nn.Module], projector: nn.Module, last: int, rank: RankPatches
    ) -> None:
        self.enabled = True
        self.rows: list[int] = []
        self.patches = 0
        self.last, self._rank = last, rank
        self._projected: dict[str, Tensor] = {}
        self._places_IM: Tensor | None = None
        self._valid_IM: Tensor | None = None
        self._score_IM: Tensor | None = None
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._enter, number), with_kwargs=False)
            if number > last:
                continue
            attention = cast(Any, layer).self_attn
            # The layer's own products are used, so that nothing is computed twice.
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(attention, name).register_forward_hook(partial(self._keep, name))
            layer.register_forward_hook(partial(self._leave, number))
        projector.register_forward_hook(self._spread)

    def places(self) -> Tensor | None:
        """Return the positions in their images of the current patches, [I, M]."""
        return self._places_IM

    def _enter(self, number: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        states_ISD: Tensor = args[0]
        if not self.enabled:
            self._places_IM = None
            return None
        if number == 0:
            images, self.patches = states_ISD.shape[0], states_ISD.shape[1] - 1
            places_P = torch.arange(self.patches, device=states_ISD.device)
            self._places_IM = places_P.expand(images, -1)
            self._valid_IM = torch.ones_like(self._places_IM, dtype=torch.bool)
            self._score_IM, self.rows = None, []
        self.rows.append(states_ISD.shape[1])
        valid_IM = cast(Tensor, self._valid_IM)
        if bool(valid_IM.all()):
            return None
        # Additive, which every implementation except flash attention supports.
        hidden_IS = torch.cat([torch.zeros_like(valid_IM[:, :1]), ~valid_IM], dim=1)
        mask_IS = torch.zeros_like(hidden_IS, dtype=states_ISD.dtype)
        mask_IS = mask_IS.masked_fill(hidden_IS, torch.finfo(states_ISD.dtype).min)
        return states_ISD, mask_IS[:, None, None, :], *args[2:]

    def _keep(self, name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.enabled:
            self._projected[name] = output

    def _leave(
        self, number: int, layer: nn.Module, args: tuple[Any, ...], states_ISD: Tensor
    ) -> Tensor | None:
        if not self.enabled:
            return None
        attention = cast(Any, layer).self_attn
        q_ISHd, k_ISHd, v_ISHd = (
            self._projected.pop(name).unflatten(-1, (attention.num_heads, -1)).float()
            for name in ("q_proj", "k_proj", "v_proj")
        )
        places_IM, valid_IM = cast(Tensor, self._places_IM), cast(Tensor, self._valid_IM)
        query_IHd = q_ISHd[:, 0] * attention.scale
        rows = TowerRows(self.last - number, self.patches, query_IHd, k_ISHd, v_ISHd, valid_IM)
        self._score_IM, left_I = self._rank(rows, self._score_IM)
        count = int(left_I.max())
        if bool((left_I >= valid_IM.sum(dim=1)).all()):
            return None
        # Among equal scores the earlier patch wins, and padding loses; then restore raster order.
        score_IM = self._score_IM.masked_fill(~valid_IM, -torch.inf)
        best_IM = score_IM.argsort(dim=1, descending=True, stable=True)[:, :count]
        stay_IM = torch.arange(count, device=best_IM.device) < left_I[:, None]
        order_IM = best_IM.masked_fill(~stay_IM, self.patches).argsort(dim=1)
        best_IM = best_IM.gather(1, order_IM)
        self._valid_IM = stay_IM.gather(1, order_IM)
        self._places_IM = places_IM.gather(1, best_IM)
        self._score_IM = self._score_IM.gather(1, best_IM)
        row_IM1 = best_IM[..., None].expand(-1, -1, states_ISD.shape[-1])
        return torch.cat([states_ISD[:, :1], states_ISD[:, 1:].gather(1, row_IM1)], dim=1)

    def _spread(self, _: nn.Module, args: tuple[Any, ...], output_IMD: Tensor) -> Tensor | None:
        places_IM, self._places_IM = self._places_IM, None
        # The projector is also called for separate features, which is not part of a pass.
        if not self.enabled or places_IM is None:
            return None
        return spread(output_IMD, places_IM, self.patches)


def spread(values: Tensor, places_IM: Tensor, patches: int) -> Tensor:
    """Scatter values [I, M, ...] to their positions among `patches`, with zeros elsewhere."""
    empty = values.new_zeros(values.shape[0], patches, *values.shape[2:])
    images_I1 = torch.arange(len(values), device=values.device)[:, None]
    empty[images_I1, places_IM] = values
    return empty
