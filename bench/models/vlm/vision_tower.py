"""Attention, keys and features of visual tokens, read from a vision tower.

Shapes: I images (or tiles), S patches and the class token of one, P patches of a call, V visual
tokens of a call in the order in which they were encoded, c patches merged into a token, D tower
width, H heads, d a head's width, F width of the features before the projector.

Only what is read is computed: the query of the class token, or queries in chunks if there is no
class token, in the layer whose output is projected and in layers that a method names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isqrt
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from bench.errors import UserError
from bench.models.macs import matrix_weights
from bench.models.network import NetworkConfig, TransformersNetwork

# Queries per chunk when the attention of all patches is needed: bounds the [H, Q, P] weights.
QUERY_CHUNK = 256

# Models whose tower prepends a class token to an image.
CLASS_TOKEN_MODELS = ("llava", "internvl")

# Those in which a patch is a token, so that the class token is of the same kind.
PATCH_TOKEN_MODELS = ("llava",)


@dataclass(frozen=True)
class LayerRequest:
    """One more layer that a method reads, in a tower whose patches are tokens (CLIP in LLaVA).

    `layer` counts from 0, or from -1 at the end; a float is the share of the depth at which the
    layer ends, `projected` the layer whose output is projected. `queries` are those whose attention
    counts: the class token's, or the mean over the class token and all patches. With `one_head`,
    queries and keys are not split into heads.
    """

    layer: int | float | Literal["projected"]
    queries: Literal["class", "all"] = "class"
    one_head: bool = False


@dataclass(frozen=True)
class LayerReading:
    """Attention that each token receives in one layer, mean over heads, and its keys [V, D]."""

    received_V: Tensor
    keys_VD: Tensor

    def select(self, index: Tensor) -> LayerReading:
        """Return the tokens with these numbers, in any shape."""
        return LayerReading(self.received_V[index], self.keys_VD[index])


@dataclass(frozen=True)
class TowerOutput:
    """The visual tokens of one call as the tower produced them, in reading order inside a frame.

    `received_V` is the attention that a token receives from the class token, or the mean over all
    patches of its frame if the tower has none; heads are averaged, and the patches of one token
    summed. `keys_VHd` are means over patches. `features_VF` are the projector's inputs, and
    `project` maps such features [n, F] to embeddings [n, d_model]. `class_VF` are the features that
    the class token of a token's image would have there; None if it cannot be projected alone.
    `layers` holds the further layers that were requested.
    """

    received_V: Tensor
    keys_VHd: Tensor
    features_VF: Tensor
    project: Callable[[Tensor], Tensor]
    class_VF: Tensor | None = None
    layers: Mapping[LayerRequest, LayerReading] = field(default_factory=dict)

    def select(self, index: Tensor) -> TowerOutput:
        """Return the tokens with these numbers, in any shape."""
        return TowerOutput(
            self.received_V[index],
            self.keys_VHd[index],
            self.features_VF[index],
            self.project,
            None if self.class_VF is None else self.class_VF[index],
            {request: reading.select(index) for request, reading in self.layers.items()},
        )


@dataclass(frozen=True)
class TowerSizes:
    """MACs that `read` performs for a call, and widths of what it returns.

    `keys` is the width of a token's keys over all `heads`, `features` that of the projector's
    input; `project` is the MACs of projecting one token, `layers` those of reading each requested
    layer. `class_token`: there is one that can be projected like a patch.
    """

    reading_macs: int
    keys: int
    heads: int
    features: int
    project: int
    layers: Mapping[LayerRequest, int] = field(default_factory=dict)
    class_token: bool = False


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


class TowerParts(NamedTuple):
    """A vision tower, the attention that is read in it, and its projector."""

    tower: nn.Module
    attention: nn.Module
    projector: nn.Module


@dataclass
class TowerCall:
    """One pass through the tower: inputs of the observed attention and of the projector.

    `states` are the outputs of the observed layer where it has a class token, `layers` the inputs
    of attention in requested layers, by number.
    """

    hidden: Tensor
    kwargs: AttentionArguments
    features: Tensor
    grids: Tensor | None
    states: Tensor | None = None
    layers: dict[int, Tensor] = field(default_factory=dict)


class Tower:
    """Observer of a network's vision tower, active from its construction.

    Raises:
        UserError: the tower is not supported.
    """

    def __init__(self, network: nn.Module) -> None:
        self.config = cast(TransformersNetwork, network).config
        tower, self._attention, self._projector = tower_parts(network)
        self._hidden: tuple[Tensor, AttentionArguments] | None = None
        self._grids: Tensor | None = None
        self._states: Tensor | None = None
        self._layers: dict[int, Tensor] = {}
        self._requests: list[LayerRequest] = []
        self._calls: list[TowerCall] = []
        tower.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._attention.register_forward_pre_hook(self._attend, with_kwargs=True)
        self._projector.register_forward_pre_hook(self._project)
        self._encoder: Sequence[nn.Module] = ()
        if self.config.model_type in PATCH_TOKEN_MODELS:
            # Feature layer -1 has no layer behind it; either way the module holds its attention.
            self._encoder = cast(Any, tower).encoder.layers
            observed = next(m for m in self._encoder if cast(Any, m).self_attn is self._attention)
            observed.register_forward_hook(self._leave)

    def request(self, *requests: LayerRequest) -> None:
        """Read further layers from now on.

        Raises:
            UserError: the tower has no class token, several patches make one token, or there is no
                such layer.
        """
        for request in requests:
            number = self._layer_number(request)
            if request not in self._requests:
                self._requests.append(request)
                attention = cast(Any, self._encoder[number]).self_attn
                attention.register_forward_pre_hook(partial(self._enter, number), with_kwargs=True)

    def _layer_number(self, request: LayerRequest) -> int:
        depth, layer = len(self._encoder), request.layer
        if depth and layer == "projected":
            return _feature_layer_index(self.config, depth)
        if depth and isinstance(layer, float):
            return max(0, round(layer * depth) - 1)
        if isinstance(layer, int) and -depth <= layer < depth:
            return layer % depth
        raise UserError(
            f"layer {layer} of the vision tower of {self.config.model_type} cannot be read: it "
            f"must have a class token, one patch per token and that layer (it has {depth} such "
            "layers)"
        )

    def _enter(
        self, number: int, _: nn.Module, args: tuple[Tensor, ...], kwargs: AttentionArguments
    ) -> None:
        self._layers[number] = args[0] if args else kwargs["hidden_states"]

    def _leave(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._states = output

    def _begin(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: AttentionArguments) -> None:
        # Only towers for images of any size (Qwen) receive grids.
        self._grids = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)

    def _attend(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: AttentionArguments) -> None:
        self._hidden = (args[0] if args else kwargs["hidden_states"]), kwargs

    def _project(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        # The projector comes last in a pass. `TowerOutput.project` calls it as well, without a pass
        # through the tower: there is nothing to record then.
        if self._hidden is not None:
            call = TowerCall(*self._hidden, args[0], self._grids, self._states, self._layers)
            self._calls.append(call)
            self._hidden, self._states, self._layers = None, None, {}

    def take_calls(self) -> list[TowerCall]:
        """Return the passes since the last call of this method, and forget them."""
        calls, self._calls = self._calls, []
        return calls

    def sizes(self, frames: Sequence[int]) -> TowerSizes:
        """Return the cost of reading frames with these numbers of visual tokens."""
        merged = patches_per_token(self.config)
        patches = [count * merged for count in frames]
        if self.config.model_type in CLASS_TOKEN_MODELS:
            attention = cast(ClassTokenAttention, self._attention)
            heads, width = attention.num_heads, attention.q_proj.out_features
            # One query per frame (the class token), keys for all patches and the class token, and
            # their products, `width` MACs each.
            macs = matrix_weights(attention.q_proj) * len(frames)
            macs += sum(
                (count + 1) * (matrix_weights(attention.k_proj) + width) for count in patches
            )
        else:
            qkv = cast(PatchAttention, self._attention).qkv
            heads = cast(PatchAttention, self._attention).num_heads
            width = qkv.out_features // 3
            # `qkv` computes values as well, which are not used; products are count² pairs of
            # `width` MACs.
            macs = sum(count * matrix_weights(qkv) + count**2 * width for count in patches)
        layers = {request: self._request_macs(request, patches) for request in self._requests}
        project = matrix_weights(self._projector)
        has_class = bool(self._encoder)
        return TowerSizes(macs, width, heads, width * merged, project, layers, has_class)

    def _request_macs(self, request: LayerRequest, patches: Sequence[int]) -> int:
        layer: Any = self._encoder[self._layer_number(request)]
        attention = cast(ClassTokenAttention, layer.self_attn)
        width, queries = attention.q_proj.out_features, 0
        for count in patches:
            queries += 1 if request.queries == "class" else count + 1
        rows = sum(count + 1 for count in patches)
        products = rows if request.queries == "class" else sum((n + 1) ** 2 for n in patches)
        projected = queries * matrix_weights(attention.q_proj)
        return projected + rows * matrix_weights(attention.k_proj) + products * width

    @torch.no_grad()
    def read(self, calls: list[TowerCall]) -> TowerOutput:
        """Compute the tower output of these passes, in their order."""
        read = _read_class_token if self.config.model_type in CLASS_TOKEN_MODELS else _read_patches
        found = [read(self.config, self._attention, call) for call in calls]
        received, keys, features = (torch.cat(part) for part in zip(*found, strict=True))
        width = calls[0].features.shape[-1]

        def project(features_nF: Tensor) -> Tensor:
            embedded: Tensor = self._projector(features_nF.reshape(-1, width))
            return embedded

        states = [call.states for call in calls if call.states is not None]
        class_VF = None
        if states and states[0].shape[-1] == width:
            whole_ISF = torch.cat(states)
            class_VF = whole_ISF[:, :1].expand(-1, whole_ISF.shape[1] - 1, -1).flatten(0, 1)
        layers = {request: self._read_layer(request, calls) for request in self._requests}
        return TowerOutput(received, keys, features, project, class_VF, layers)

    def _read_layer(self, request: LayerRequest, calls: list[TowerCall]) -> LayerReading:
        number = self._layer_number(request)
        attention = cast(ClassTokenAttention, cast(Any, self._encoder[number]).self_attn)
        hidden_ISD = torch.cat([call.layers[number] for call in calls])
        k_ISD = attention.k_proj(hidden_ISD)
        heads = 1 if request.one_head else attention.num_heads
        asked_IQD = attention.q_proj(
            hidden_ISD[:, :1] if request.queries == "class" else hidden_ISD
        )
        scale = (k_ISD.shape[-1] / heads) ** -0.5
        received_IP = _mean_attention(asked_IQD, k_ISD, heads, scale)[:, 1:]
        return LayerReading(received_IP.flatten(), k_ISD[:, 1:].flatten(0, 1))


def tower_parts(network: nn.Module) -> TowerParts:
    """Return the parts of a network's vision tower.

    The attention is that of the layer whose output is projected (CLIP's penultimate in LLaVA), or
    of the last layer in which patches attend to all of their frame (Qwen).

    Raises:
        UserError: the tower is not supported.
    """
    config = cast(TransformersNetwork, network).config
    inner: Any = network.model
    kind = config.vision_config.model_type
    if config.model_type == "internvl":
        layers = inner.vision_tower.encoder.layer
        layer = layers[_feature_layer_index(config, len(layers))]
        return TowerParts(inner.vision_tower, layer.attention, inner.multi_modal_projector)
    if config.model_type == "llava" and kind == "clip_vision_model":
        layers = inner.vision_tower.encoder.layers
        layer = layers[_feature_layer_index(config, len(layers))]
        return TowerParts(inner.vision_tower, layer.self_attn, inner.multi_modal_projector)
    if config.model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"):
        full = getattr(config.vision_config, "fullatt_block_indexes", None) or [-1]
        return TowerParts(inner.visual, inner.visual.blocks[max(full)].attn, inner.visual.merger)
    raise UserError(
        f"the vision tower of {config.model_type} ({kind}) cannot be read: what reads towers is "
        "for llava with clip_vision_model, internvl and Qwen-VL"
    )


def patches_per_token(config: NetworkConfig) -> int:
    """Return the number of patches that are merged into one visual token."""
    return _merge_side(config) ** 2


def _merge_side(config: NetworkConfig) -> int:
    """Return the side of the square of patches that are merged into one visual token."""
    if config.model_type in CLASS_TOKEN_MODELS:
        return round(1 / getattr(config, "downsample_ratio", 1))
    return int(config.vision_config.spatial_merge_size)


def _feature_layer_index(config: NetworkConfig, depth: int) -> int:
    """Return the index of the layer whose output is projected."""
    chosen = config.vision_feature_layer
    if not isinstance(chosen, int):
        raise UserError(f"vision_feature_layer={chosen}: attention is read at one layer only")
    # Hidden state 0 is the embedding, so state k is the output of layer k - 1.
    return max(depth + chosen if chosen < 0 else chosen - 1, 0)


TowerReading = tuple[Tensor, Tensor, Tensor]


def _read_class_token(config: NetworkConfig, module: nn.Module, call: TowerCall) -> TowerReading:
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
    received_IP, keys_IPHd = received_IS[:, 1:], k_ISHd[:, 1:]
    received_INc = _by_token(received_IP, side)
    keys_INcHd = _by_token(keys_IPHd, side)
    features_VF = call.features.flatten(0, 1)
    return received_INc.sum(2).flatten(), keys_INcHd.mean(2).flatten(0, 1), features_VF


def _by_token(x_IP: Tensor, merged: int) -> Tensor:
    """Group values of patches [I, P, ...] by token, [I, P / c, c, ...], with c = merged²."""
    side = isqrt(x_IP.shape[1])
    # Pixel shuffle (InternVL) merges squares of `merged` x `merged` patches; rows and columns are
    # split into (token, offset) and the two offsets brought together.
    grid: Tensor = x_IP.unflatten(1, (side // merged, merged, side // merged, merged))
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _read_patches(config: NetworkConfig, module: nn.Module, call: TowerCall) -> TowerReading:
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


def _mean_attention(q_IQD: Tensor, k_ISD: Tensor, heads: int, scale: float) -> Tensor:
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
