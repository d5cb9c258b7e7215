"""Attention, keys and features of visual tokens, read from a vision tower.

Shapes: I images (or tiles), S rows of an image (its patches and the class token), P patches of a
call, V visual tokens of a call in order of encoding, c patches merged into a token, D tower width,
H heads, d a head's width, F width of the features before the projector.

Only what is read is computed: the query of the class token, or queries in chunks if there is no
class token, in the layer whose output is projected and in layers that a method requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from bench.errors import UserError
from bench.models.macs import matrix_weights
from bench.models.network import NetworkConfig, TransformersNetwork
from bench.models.vlm.tower_pass import (
    CLASS_TOKEN_MODELS,
    AttentionArguments,
    ClassTokenAttention,
    PatchAttention,
    RankPatches,
    TowerCall,
    TowerPruning,
    mean_attention,
    patches_per_token,
    read_class_token,
    read_patches,
)

# Models in which a patch is a token, so that the class token has the same form as a visual token.
PATCH_TOKEN_MODELS = ("llava",)

READ_AND_PRUNED = (
    "one method prunes inside the vision tower and another prunes there too or reads layers of it: "
    "list only one of them"
)


@dataclass(frozen=True)
class LayerRequest:
    """A further layer that a method reads, in a tower whose patches are tokens (CLIP in LLaVA).

    `layer` counts from 0, or from -1 at the end; a float is the relative depth of the layer's end,
    and `projected` is the layer whose output is projected. `queries` selects the attention: that of
    the class token, or the mean over the class token and all patches. With `one_head`, queries and
    keys are not split into heads.
    """

    layer: int | float | Literal["projected"]
    queries: Literal["class", "all"] = "class"
    one_head: bool = False


@dataclass(frozen=True)
class LayerReading:
    """Attention that each token receives in one layer, averaged over heads, and its keys [V, D]."""

    received_V: Tensor
    keys_VD: Tensor

    def select(self, index: Tensor) -> LayerReading:
        """Return the tokens with these indices, in any shape."""
        return LayerReading(self.received_V[index], self.keys_VD[index])


@dataclass(frozen=True)
class TowerOutput:
    """The visual tokens of one call as the tower computes them, in reading order per frame.

    `received_V` is the attention that a token receives from the class token, or the mean over all
    patches of its frame if there is no class token; heads are averaged, and patches of a token are
    summed. `keys_VHd` are means over patches. `features_VF` are the projector's inputs, and
    `project` maps such features [n, F] to embeddings [n, d_model]. `class_VF` are the corresponding
    features of the class token of a token's image, None if they cannot be projected. `layers` are
    the further layers requested. `kept_V` marks the remaining tokens if a method removes some
    inside the tower; values of the others are zero.
    """

    received_V: Tensor
    keys_VHd: Tensor
    features_VF: Tensor
    project: Callable[[Tensor], Tensor]
    class_VF: Tensor | None = None
    layers: Mapping[LayerRequest, LayerReading] = field(default_factory=dict)
    kept_V: Tensor | None = None

    def select(self, index: Tensor) -> TowerOutput:
        """Return the tokens with these indices, in any shape."""
        return TowerOutput(
            self.received_V[index],
            self.keys_VHd[index],
            self.features_VF[index],
            self.project,
            None if self.class_VF is None else self.class_VF[index],
            {request: reading.select(index) for request, reading in self.layers.items()},
            None if self.kept_V is None else self.kept_V[index],
        )


@dataclass(frozen=True)
class TowerSizes:
    """MACs of `read` for a call, and widths of its results.

    `keys` is the width of a token's keys over all `heads`, `features` that of the projector's
    input. `project` is the MACs to project one token, `layers` those to read each requested layer.
    `class_token` is true if there is one that can be projected like a patch. `rows` are the rows
    per image in the last pass, for each layer after which a method may remove some.
    """

    reading_macs: int
    keys: int
    heads: int
    features: int
    project: int
    layers: Mapping[LayerRequest, int] = field(default_factory=dict)
    class_token: bool = False
    rows: tuple[int, ...] = ()


class TowerParts(NamedTuple):
    """A vision tower, the attention module to observe, and the projector."""

    tower: nn.Module
    attention: nn.Module
    projector: nn.Module


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
        self.pruning: TowerPruning | None = None
        tower.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._attention.register_forward_pre_hook(self._attend, with_kwargs=True)
        self._projector.register_forward_pre_hook(self._project)
        self._encoder: Sequence[nn.Module] = ()
        if self.config.model_type in PATCH_TOKEN_MODELS:
            # With feature layer -1 no layer follows, but the module has the attention in any case.
            self._encoder = cast(Any, tower).encoder.layers
            observed = next(m for m in self._encoder if cast(Any, m).self_attn is self._attention)
            observed.register_forward_hook(self._leave)

    def request(self, *requests: LayerRequest) -> None:
        """Read further layers in later passes.

        Raises:
            UserError: the tower has no class token, merges patches into tokens, or has no such
                layer.
        """
        if requests and self.pruning is not None:
            raise UserError(READ_AND_PRUNED)
        for request in requests:
            number = self._layer_number(request)
            if request not in self._requests:
                self._requests.append(request)
                attention = cast(Any, self._encoder[number]).self_attn
                attention.register_forward_pre_hook(partial(self._enter, number), with_kwargs=True)

    def prune(self, name: str, rank: RankPatches) -> None:
        """Remove patches inside the tower in later passes, by the scores of the method `name`.

        They are removed before the layer whose output is projected.

        Raises:
            UserError: the tower has no class token or merges patches into tokens, no layer precedes
                the projected one, or another method removes patches or reads further layers.
        """
        if self._requests or self.pruning is not None:
            raise UserError(READ_AND_PRUNED)
        last = self._layer_number(LayerRequest("projected")) - 1
        if last < 0:
            raise UserError(
                f"{name} prunes before the layer of the vision tower whose output is projected, "
                "but that is the first one "
                f"(vision_feature_layer={self.config.vision_feature_layer})"
            )
        if "flash" in str(getattr(self.config.vision_config, "_attn_implementation", "")):
            raise UserError(
                f"{name} masks patches of the vision tower, which flash attention cannot: set "
                "model.attention=sdpa"
            )
        self.pruning = TowerPruning(self._encoder, self._projector, last, rank)

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
        # Only towers for images of any size (Qwen) get grids.
        self._grids = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)

    def _attend(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: AttentionArguments) -> None:
        self._hidden = (args[0] if args else kwargs["hidden_states"]), kwargs

    def _project(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        # The projector is last in a pass. `TowerOutput.project` also calls it, without a pass
        # through the tower, which must not be recorded.
        if self._hidden is not None:
            call = TowerCall(*self._hidden, args[0], self._grids, self._states, self._layers)
            if self.pruning is not None:
                call.places, call.patches = self.pruning.places(), self.pruning.patches
            self._calls.append(call)
            self._hidden, self._states, self._layers = None, None, {}

    def take_calls(self) -> list[TowerCall]:
        """Return the passes since the last call of this method, and discard them."""
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
            # their products, with `width` MACs each.
            macs = matrix_weights(attention.q_proj) * len(frames)
            macs += sum(
                (count + 1) * (matrix_weights(attention.k_proj) + width) for count in patches
            )
        else:
            qkv = cast(PatchAttention, self._attention).qkv
            heads = cast(PatchAttention, self._attention).num_heads
            width = qkv.out_features // 3
            # `qkv` also computes values, which are not used; products are count² pairs with `width`
            # MACs each.
            macs = sum(count * matrix_weights(qkv) + count**2 * width for count in patches)
        layers = {request: self._request_macs(request, patches) for request in self._requests}
        project = matrix_weights(self._projector)
        has_class = bool(self._encoder)
        rows = () if self.pruning is None else tuple(self.pruning.rows[: self.pruning.last + 1])
        return TowerSizes(macs, width, heads, width * merged, project, layers, has_class, rows)

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
        """Compute the tower's output for these passes, in their order."""
        read = read_class_token if self.config.model_type in CLASS_TOKEN_MODELS else read_patches
        found = [read(self.config, self._attention, call) for call in calls]
        received, keys, features = (torch.cat(part) for part in zip(*found, strict=True))
        width = calls[0].features.shape[-1]

        def project(features_nF: Tensor) -> Tensor:
            embedded: Tensor = self._projector(features_nF.reshape(-1, width))
            return embedded

        states = [call.states for call in calls if call.states is not None]
        class_VF = None
        if states and states[0].shape[-1] == width:
            class_I1F = torch.cat([each[:, :1] for each in states])
            class_VF = class_I1F.expand(-1, len(received) // len(class_I1F), -1).flatten(0, 1)
        layers = {request: self._read_layer(request, calls) for request in self._requests}
        kept = [
            call.whole(torch.ones_like(call.places, dtype=torch.bool)).flatten()
            for call in calls
            if call.places is not None
        ]
        kept_V = torch.cat(kept) if kept else None
        return TowerOutput(received, keys, features, project, class_VF, layers, kept_V)

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
        received_IP = mean_attention(asked_IQD, k_ISD, heads, scale)[:, 1:]
        return LayerReading(received_IP.flatten(), k_ISD[:, 1:].flatten(0, 1))


def tower_parts(network: nn.Module) -> TowerParts:
    """Return the parts of a network's vision tower.

    The attention is that of the layer whose output is projected (CLIP's penultimate in LLaVA), or
    of the last layer in which patches attend to their whole frame (Qwen).

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
        f"the vision tower of {config.model_type} ({kind}) is not supported: methods that read it "
        "need llava with clip_vision_model, internvl or Qwen-VL"
    )


def _feature_layer_index(config: NetworkConfig, depth: int) -> int:
    """Return the index of the layer whose output is projected."""
    chosen = config.vision_feature_layer
    if not isinstance(chosen, int):
        raise UserError(f"vision_feature_layer={chosen}: attention can be read in only one layer")
    # Hidden state 0 is the embedding, so state k is the output of layer k - 1.
    return max(depth + chosen if chosen < 0 else chosen - 1, 0)
