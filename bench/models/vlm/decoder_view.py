"""The decoder of a vision-language model as matrices, independent of how they are stored.

Shapes: D d_model, H query heads, G key-value heads, d a head's width, F the feed-forward's width.

A layer is supported if it computes x + attention(norm(x)) and then x + feed_forward(norm(x)), with
rotary positions and attention to all earlier tokens. Each branch may have a norm before it is added
(Gemma 3, GLM-4V), or both may share an input norm (Cohere 2). Modules do not show this, so
supported decoders are listed by name, and a test compares each with transformers' own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor, nn

from bench.errors import UserError
from bench.models.network import NetworkConfig, TransformersNetwork
from bench.models.structure.expert_view import Activation, ExpertView, gated_projections
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import MoEBlock, UnsupportedStructure, moe_block_of

# Values of the text config's `model_type`. Before adding one, add it to the equality test.
SUPPORTED_DECODERS = (
    "cohere2",
    "gemma",
    "gemma3_text",
    "glm4v_text",
    "llama",
    "mistral",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3",
    "qwen3_moe",
    "qwen3_vl_text",
    "qwen3_vl_moe_text",
)


# Decoders with sliding windows, which are supported for lengths up to the window, where it has no
# effect.
WINDOWED_DECODERS = ("cohere2", "gemma3_text")

# Decoders that rotate neighbours (0, 1), (2, 3), ... of a head's components instead of its halves.
INTERLEAVED_DECODERS = ("cohere2", "glm4v_text")

# Reasons why some popular decoders are not supported.
REFUSED_DECODERS = {
    "gemma2": "it caps the products of attention, which fused kernels do not",
}


class _Layer(Protocol):
    """Decoder layer of a supported architecture."""

    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    post_self_attn_layernorm: nn.Module
    post_mlp_layernorm: nn.Module
    pre_feedforward_layernorm: nn.Module
    post_feedforward_layernorm: nn.Module
    self_attn: nn.Module
    mlp: nn.Module


class _Attention(Protocol):
    """Attention of a supported architecture; Phi-3 has `qkv_proj`, the others `q_proj` etc."""

    config: NetworkConfig
    head_dim: int
    scaling: float
    qkv_proj: nn.Linear
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear


class _FusedFeedForward(Protocol):
    """Phi-3's feed-forward, whose gate and up are one matrix."""

    gate_up_proj: nn.Linear
    down_proj: nn.Linear
    activation_fn: Activation


@dataclass(frozen=True)
class Projection:
    """A weight [out, in] and a bias [out], as views of the network's own."""

    weight: Tensor
    bias: Tensor | None = None

    def rows(self, start: int, stop: int) -> Projection:
        """Return the outputs `start` to `stop`, as views."""
        bias = None if self.bias is None else self.bias[start:stop]
        return Projection(self.weight[start:stop], bias)


@dataclass(frozen=True)
class AttentionView:
    """The four projections of a layer's attention: q [H·d, D], k and v [G·d, D], o [D, H·d].

    `q_norm` and `k_norm`, if any, act on single heads before the rotation, which is of neighbouring
    components if `interleaved`, else of halves.
    """

    q: Projection
    k: Projection
    v: Projection
    o: Projection
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    heads: int
    groups: int
    head_dim: int
    scaling: float
    interleaved: bool = False


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer: the module and its parts.

    A branch's output is normed before it is added if the layer has such a norm; without its own
    input norm, the feed-forward reads the input of attention. `kind` is the layer's type if types
    have different rotations. `loaded_moe` is its MoE block as loaded, None in a dense layer.
    """

    index: int
    module: nn.Module
    attention_norm: nn.Module
    feed_forward_norm: nn.Module | None
    attention: nn.Module
    feed_forward: nn.Module
    loaded_moe: MoEBlock | None
    attention_output_norm: nn.Module | None = None
    feed_forward_output_norm: nn.Module | None = None
    kind: str | None = None

    def feed_forward_input(self, normed: Tensor, attended: Tensor) -> Tensor:
        """Return the input of the feed-forward: states after attention, or attention's input."""
        norm = self.feed_forward_norm
        return normed if norm is None else _through(norm, attended)

    def attended(self, branch: Tensor) -> Tensor:
        """Return the contribution of attention to the states, from its projected output."""
        return _through(self.attention_output_norm, branch)

    def fed_forward(self, branch: Tensor) -> Tensor:
        """Return the contribution of the feed-forward to the states, from its output."""
        return _through(self.feed_forward_output_norm, branch)

    @property
    def moe(self) -> MoEBlock | None:
        """The MoE block in its current state, because a method may have replaced its experts."""
        if self.loaded_moe is None:
            return None
        try:
            # Inspected on every access, because methods replace experts inside the same block.
            before = self.loaded_moe
            found = moe_block_of(self.index, before.name, before.block, self.module, before.top_k)
            # Copies of a block with fewer neurons can be built only from the usual matrices.
            if found.unusual is not None:
                raise UnsupportedStructure(f"its experts have {found.unusual}")
            if found.shared is not None and found.shared_owner is not found.block:
                raise UnsupportedStructure("its shared experts are beside it")
            return found
        except UnsupportedStructure as difference:
            raise UserError(f"in {self.loaded_moe.name}, {difference}") from None

    def attention_view(self) -> AttentionView:
        """View the current projections, because a method may have replaced them."""
        return _attention_view(cast(_Attention, self.attention))

    def units(self) -> tuple[ExpertView, ...]:
        """View every gated feed-forward of the layer: the dense one, or all experts.

        Routed experts come first, by index, then the shared experts as one.
        """
        moe = self.moe
        if moe is None:
            return (feed_forward_view(self.feed_forward),)
        routed = [moe.expert(index) for index in range(moe.num_experts)]
        shared = moe.shared_view()
        return tuple(routed) if shared is None else (*routed, shared)


@dataclass(frozen=True)
class Decoder:
    """The language model inside a vision-language model.

    `inner` is the module that receives ids and pixels and calls `module`, the text decoder.
    """

    inner: nn.Module
    module: nn.Module
    layers: tuple[DecoderLayer, ...]

    @property
    def config(self) -> NetworkConfig:
        """The text decoder's own config."""
        return cast(TransformersNetwork, self.module).config

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of layers with different rotations, empty if all have the same."""
        return tuple(sorted({layer.kind for layer in self.layers if layer.kind is not None}))

    @property
    def reach(self) -> int | None:
        """Number of tokens up to which all layers attend to all earlier ones; None if unlimited."""
        sliding = "sliding_attention" in self.kinds
        return int(self.config.sliding_window) if sliding else None


def open_decoder(network: nn.Module, structure: ModelStructure) -> Decoder:
    """Return the decoder of a vision-language model.

    Raises:
        UserError: the decoder is not supported, or its weights are not all on one device.
    """
    inner = cast(nn.Module, network.model)
    layers = decoder_layers(structure)
    devices = {weight.device for layer in layers for weight in layer.module.parameters()}
    # Offloaded weights are meta tensors in the modules, whose views would be empty.
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        raise UserError(
            f"the decoder of {structure.architecture} must be in the memory of one device, but it "
            f"is on {', '.join(sorted(map(str, devices)))}: change model.device_map"
        )
    return Decoder(inner, cast(TransformersNetwork, network).get_decoder(), layers)


def decoder_layers(structure: ModelStructure) -> tuple[DecoderLayer, ...]:
    """Return the layers of a model's decoder; weights need not be loaded."""
    blocks = {block.layer: block for block in structure.moe}
    found = []
    for index, module in enumerate(structure.layers):
        config = getattr(getattr(module, "self_attn", None), "config", None)
        _refuse_unsupported(structure, config)
        layer = cast(_Layer, module)
        windowed = getattr(config, "model_type", None) in WINDOWED_DECODERS
        types = getattr(config, "layer_types", None) if windowed else None
        norms = _norms(layer)
        found.append(
            DecoderLayer(
                index=index,
                module=module,
                attention_norm=layer.input_layernorm,
                feed_forward_norm=norms[1],
                attention=layer.self_attn,
                feed_forward=layer.mlp,
                loaded_moe=blocks.get(index),
                attention_output_norm=norms[0],
                feed_forward_output_norm=norms[2],
                kind=None if types is None else types[index],
            )
        )
    return tuple(found)


def _through(norm: nn.Module | None, x: Tensor) -> Tensor:
    """Apply the norm to some rows, or return the rows themselves if there is none."""
    normed: Tensor = x if norm is None else norm(x)
    return normed


def _norms(layer: _Layer) -> tuple[nn.Module | None, nn.Module | None, nn.Module | None]:
    """Return a layer's norms: of attention's output, and of feed-forward input and output."""
    # `post_attention_layernorm` is the first one in Gemma, and the second one elsewhere.
    if hasattr(layer, "pre_feedforward_layernorm"):
        return (
            layer.post_attention_layernorm,
            layer.pre_feedforward_layernorm,
            layer.post_feedforward_layernorm,
        )
    if hasattr(layer, "post_self_attn_layernorm"):
        return (
            layer.post_self_attn_layernorm,
            layer.post_attention_layernorm,
            layer.post_mlp_layernorm,
        )
    return None, getattr(layer, "post_attention_layernorm", None), None


def feed_forward_view(module: nn.Module) -> ExpertView:
    """View a dense feed-forward as gate, up and down; gate and up may be one matrix.

    Unlike views of experts, these views stay in the autograd graph, for training.
    """
    separate = gated_projections(module)
    if separate is not None:
        gate, up, down = (linear.weight for linear in separate)
        return ExpertView(gate, up, down, cast(Activation, module.act_fn))
    if not isinstance(getattr(module, "gate_up_proj", None), nn.Linear):
        raise UserError(
            f"the feed-forward {type(module).__name__} has no gate, up and down matrices"
        )
    # Order of rows in Phi-3: gate first; its activation is called `activation_fn`.
    part = cast(_FusedFeedForward, module)
    gate, up = part.gate_up_proj.weight.chunk(2, dim=0)
    return ExpertView(gate, up, part.down_proj.weight, part.activation_fn)


def _refuse_unsupported(structure: ModelStructure, config: NetworkConfig | None) -> None:
    """Raise unless the layer belongs to a supported decoder with full attention."""
    kind = getattr(config, "model_type", None)
    if kind in REFUSED_DECODERS:
        raise UserError(
            f"visual-token methods do not support the decoder of {structure.architecture} "
            f"({kind}): {REFUSED_DECODERS[kind]}"
        )
    if config is None or kind not in SUPPORTED_DECODERS:
        raise UserError(
            f"the decoder of {structure.architecture} is a {kind or 'kind without self_attn'}, "
            f"which is not supported: choose a model with one of {', '.join(SUPPORTED_DECODERS)}"
        )
    if kind in WINDOWED_DECODERS:
        return
    sliding = getattr(config, "sliding_window", None)
    types: Sequence[str] = getattr(config, "layer_types", None) or ()
    # A window at least as long as the longest sequence has no effect. Without `layer_types`, a
    # config with a window applies it in all layers.
    everything = sliding is None or sliding >= config.max_position_embeddings
    if not everything and ("sliding_attention" in types or not types):
        raise UserError(
            f"the decoder of {structure.architecture} attends in a sliding window of {sliding} "
            "tokens, which visual-token methods do not support"
        )


def _attention_view(module: _Attention) -> AttentionView:
    """View the projections of an attention module, separate or fused into one matrix."""
    config, width = module.config, module.head_dim
    # Counted from the weights, because a config has one number for all layers, and a method may
    # have removed different heads in each. A pruned fused module has its own config.
    if hasattr(module, "qkv_proj"):
        fused = _projection(module.qkv_proj)
        heads = config.num_attention_heads
        groups = (fused.weight.shape[0] // width - heads) // 2
        # Rows of a fused matrix (Phi-3): all query heads, then all key heads, then all value heads.
        ends = (heads * width, (heads + groups) * width, (heads + 2 * groups) * width)
        q, k, v = fused.rows(0, ends[0]), fused.rows(ends[0], ends[1]), fused.rows(ends[1], ends[2])
    else:
        q, k, v = map(_projection, (module.q_proj, module.k_proj, module.v_proj))
        heads, groups = q.weight.shape[0] // width, k.weight.shape[0] // width
    return AttentionView(
        q=q,
        k=k,
        v=v,
        o=_projection(module.o_proj),
        q_norm=getattr(module, "q_norm", None),
        k_norm=getattr(module, "k_norm", None),
        heads=heads,
        groups=groups,
        head_dim=width,
        scaling=module.scaling,
        interleaved=config.model_type in INTERLEAVED_DECODERS,
    )


def _projection(linear: nn.Linear) -> Projection:
    """View a linear layer's weight and bias, still in the autograd graph."""
    return Projection(linear.weight, linear.bias)
