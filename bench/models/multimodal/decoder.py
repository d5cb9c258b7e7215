"""The decoder of a vision-language model seen as matrices, whichever way they are stored.

Shapes: D d_model, H query heads, G key-value heads, d a head's width, F the feed-forward's width.
A layer is understood when it computes x + attention(norm(x)) and then x + feed_forward(norm(x)),
with rotary positions on halves of a head and full causal attention. That cannot be seen from its
modules, so decoders are named, and each name is held by a test against transformers' own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from bench.errors import UserError
from bench.models.anatomy.dissection import Anatomy
from bench.models.anatomy.expert import ExpertView, projections
from bench.models.anatomy.moe import MoEBlock
from bench.models.anatomy.understanding import NotUnderstoodError, understand

DECODERS = (
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


@dataclass(frozen=True)
class Projection:
    """A weight [out, in] and a bias [out], views of the network's own."""

    weight: Tensor
    bias: Tensor | None = None

    def rows(self, start: int, stop: int) -> Projection:
        """Return the outputs `start` to `stop` alone, as views."""
        bias = None if self.bias is None else self.bias[start:stop]
        return Projection(self.weight[start:stop], bias)


@dataclass(frozen=True)
class AttentionView:
    """The four projections of a layer's attention: q [H·d, D], k and v [G·d, D], o [D, H·d].

    `q_norm` and `k_norm` act on single heads before rotation, where there are any.
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


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer: the module and its parts.

    `found` describes its mixture of experts as it was at first, None in a dense layer.
    """

    index: int
    module: nn.Module
    attention_norm: nn.Module
    feed_forward_norm: nn.Module
    attention: nn.Module
    feed_forward: nn.Module
    found: MoEBlock | None

    @property
    def moe(self) -> MoEBlock | None:
        """The mixture of experts as it is now; a method may have replaced its experts."""
        if self.found is None:
            return None
        try:
            return understand(self.index, self.found.name, self.found.block, self.found.top_k)
        except NotUnderstoodError as difference:
            raise UserError(f"in {self.found.name}, {difference}") from None

    def attention_view(self) -> AttentionView:
        """Return the projections as they are now; a method may have replaced them."""
        return _attention_view(cast(Any, self.attention))

    def units(self) -> tuple[ExpertView, ...]:
        """Return every gated feed-forward in the layer: the dense one, or all experts.

        Routed experts come first, in their order, then the shared experts as one.
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
    def config(self) -> Any:
        """The text decoder's own config."""
        return self.module.config


def open_decoder(network: nn.Module, anatomy: Anatomy) -> Decoder:
    """Return the decoder of a vision-language model.

    Raises:
        UserError: it is of a kind that is not understood, or its weights are not all in the
            memory of one device.
    """
    inner = cast(Any, network).model
    layers = decoder_layers(anatomy)
    devices = {weight.device for layer in layers for weight in layer.module.parameters()}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        raise UserError(
            f"the decoder of {anatomy.architecture} must be in the memory of one device, but it is "
            f"on {', '.join(sorted(map(str, devices)))}: use another model.device_map"
        )
    return Decoder(inner=inner, module=inner.language_model, layers=layers)


def decoder_layers(anatomy: Anatomy) -> tuple[DecoderLayer, ...]:
    """Return the layers of a model's decoder, looking at modules only; works without weights."""
    blocks = {block.layer: block for block in anatomy.moe}
    found = []
    for index, module in enumerate(anatomy.layers):
        layer = cast(Any, module)
        config = getattr(getattr(layer, "self_attn", None), "config", None)
        _refuse_unknown(anatomy, config)
        found.append(
            DecoderLayer(
                index=index,
                module=module,
                attention_norm=layer.input_layernorm,
                feed_forward_norm=layer.post_attention_layernorm,
                attention=layer.self_attn,
                feed_forward=layer.mlp,
                found=blocks.get(index),
            )
        )
    return tuple(found)


def feed_forward_view(module: nn.Module) -> ExpertView:
    """Return a dense feed-forward as gate, up and down; gate and up may be one matrix.

    The views stay in the graph when the weights are being trained.
    """
    part = cast(Any, module)
    separate = projections(module)
    if separate is not None:
        gate, up, down = (linear.weight for linear in separate)
        return ExpertView(gate, up, down, part.act_fn)
    if not isinstance(getattr(module, "gate_up_proj", None), nn.Linear):
        raise UserError(f"the feed-forward {type(module).__name__} is not understood")
    gate, up = part.gate_up_proj.weight.chunk(2, dim=0)
    return ExpertView(gate, up, part.down_proj.weight, part.activation_fn)


def _refuse_unknown(anatomy: Anatomy, config: Any) -> None:
    """Raise unless the layer belongs to a decoder that is known and attends to everything."""
    kind = getattr(config, "model_type", None)
    if kind not in DECODERS:
        raise UserError(
            f"the decoder of {anatomy.architecture} is a {kind or 'kind without self_attn'}, which "
            f"is not understood: known are {', '.join(DECODERS)}"
        )
    sliding = getattr(config, "sliding_window", None)
    types: Sequence[str] = getattr(config, "layer_types", None) or ()
    everything = sliding is None or sliding >= config.max_position_embeddings
    if not everything and ("sliding_attention" in types or not types):
        raise UserError(
            f"the decoder of {anatomy.architecture} attends in a sliding window of {sliding} "
            "tokens, which visual token strategies do not support"
        )


def _attention_view(module: Any) -> AttentionView:
    """Return the projections of an attention module, from three matrices or from a fused one."""
    config, width = module.config, module.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if hasattr(module, "qkv_proj"):
        fused = _projection(module.qkv_proj)
        ends = (heads * width, (heads + groups) * width, (heads + 2 * groups) * width)
        q, k, v = fused.rows(0, ends[0]), fused.rows(ends[0], ends[1]), fused.rows(ends[1], ends[2])
    else:
        q, k, v = (_projection(getattr(module, f"{name}_proj")) for name in "qkv")
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
    )


def _projection(linear: nn.Linear) -> Projection:
    """Return a linear's weight and bias, still in the graph when they are being trained."""
    return Projection(linear.weight, linear.bias)
