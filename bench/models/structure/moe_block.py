"""A MoE block in one vocabulary, and the check that its experts are gated experts.

A block is supported when its output is y = Σ_e A_e · Wdown_e (act(Wgate_e x) ⊙ Wup_e x), plus
shared experts of the same form. The check inspects modules, not class names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from bench.models.structure.dense_layer import (
    FeedForward,
    SingleExpertRouter,
    feed_forwards,
)
from bench.models.structure.expert_view import (
    ExpertView,
    fused_view,
    gated_projections,
    module_view,
)
from bench.models.structure.ragged_experts import RaggedExperts

ExpertLayout = Literal["fused", "list", "ragged", "dense"]


@dataclass(frozen=True)
class MoEBlock:
    """One MoE block of a decoder layer, or a dense feed-forward as a block of one expert.

    `experts` takes (x [T, D], top_k_index [T, K], top_k_weights [T, K]) and returns [T, D]. Its
    weights are `fused` (all experts in 3-D parameters), a `list` of modules, or slimbench's own
    `ragged` form; widths may differ in the last two. `shared` runs on every token, multiplied by
    sigmoid(shared_gate(x)) if there is a `shared_gate`; it is None in a block without shared
    experts.

    A `dense` block has a `feed_forward`, whose owner stands for block and experts, and a router
    that is not part of the network: its one expert is always chosen, with weight 1.
    """

    layer: int
    name: str
    block: nn.Module
    experts: nn.Module
    router: nn.Module
    shared: nn.Module | None
    shared_gate: nn.Module | None
    layout: ExpertLayout
    num_experts: int
    top_k: int
    d_model: int
    widths: tuple[int, ...]
    d_shared: int
    feed_forward: FeedForward | None = None

    @property
    def d_ff(self) -> int:
        """Width of the widest routed expert; in a published network, of every routed expert."""
        return max(self.widths)

    @property
    def micro_experts(self) -> int:
        """Number of micro-experts in the block, routed and shared."""
        return self.d_shared + sum(self.widths)

    @property
    def matrices(self) -> int:
        """Number of rows and columns that make a micro-expert: gate, up, down; 2 without a gate."""
        plain = self.feed_forward is not None and self.feed_forward.form == "plain"
        return 2 if plain else 3

    @property
    def parameters_each(self) -> int:
        """Number of weights of one micro-expert: 3·D, or 2·D without a gate, and its biases."""
        biases = 0 if self.feed_forward is None else self.feed_forward.biases
        return self.matrices * self.d_model + biases

    @property
    def parameters(self) -> int:
        """Number of weights in the experts: those of all micro-experts, without router and gate."""
        return self.parameters_each * self.micro_experts

    @property
    def output_module(self) -> nn.Module:
        """The module whose output is that of the block."""
        # OPT's feed-forward is no module of its own, so what the down matrix returns is taken.
        return self.block if self.feed_forward is None else self.feed_forward.down

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules of the block, and none of those around it."""
        if self.feed_forward is None:
            return tuple(self.block.modules())
        return self.feed_forward.projections

    def expert(self, index: int) -> ExpertView:
        """View a routed expert; writing to it changes the network."""
        if self.feed_forward is not None:
            return self.feed_forward.view()
        if self.layout == "fused":
            return fused_view(self.experts, index)
        if self.layout == "ragged":
            return cast(RaggedExperts, self.experts).view(index)
        return module_view(self.experts.get_submodule(str(index)))

    def shared_view(self) -> ExpertView | None:
        """View all shared experts as one expert of width `d_shared`, or return None without any."""
        # Published blocks with several shared experts store them concatenated, as one wide expert.
        return None if self.shared is None else module_view(self.shared)


ROUTER_NAMES = ("gate", "router")
SHARED_NAMES = ("shared_expert", "shared_experts", "shared_mlp")
SHARED_GATE_NAME = "shared_expert_gate"

# Attributes that transformers' `use_experts_implementation` sets on a fused module: required value,
# and the message if it differs.
FUSED_FLAGS = {
    "is_transposed": (False, "its weights are transposed"),
    "is_concatenated": (True, "its gate and up rows are interleaved"),
    "has_bias": (False, "its experts have biases"),
    "has_gate": (True, "its experts have no gate matrix"),
    "has_post_expert_norm": (False, "a norm follows each expert"),
}


class UnsupportedStructure(Exception):
    """The experts of a block have an unsupported form; the message names the difference."""


def moe_block_of(layer: int, name: str, block: nn.Module, top_k: int | None) -> MoEBlock:
    """Describe a block that has `experts`.

    `top_k` is the value of the network's config; it is used if neither router nor block has one.

    Raises:
        UnsupportedStructure: the experts are not plain gated experts.
    """
    experts = cast(nn.Module, block.experts)
    router = _first_child(block, ROUTER_NAMES)
    if router is None:
        raise UnsupportedStructure("it has no router named gate or router")
    shared, shared_gate = (
        _first_child(block, SHARED_NAMES),
        _first_child(block, (SHARED_GATE_NAME,)),
    )
    _refuse_unknown_parts(block, (experts, router, shared, shared_gate))
    layout, d_model, widths = _expert_layout(experts)
    return MoEBlock(
        layer=layer,
        name=name,
        block=block,
        experts=experts,
        router=router,
        shared=shared,
        shared_gate=shared_gate,
        layout=layout,
        num_experts=len(widths),
        top_k=_top_k(router, block, top_k),
        d_model=d_model,
        widths=widths,
        d_shared=0 if shared is None else _gated_shape(shared)[1],
    )


def dense_block_of(layer: int, name: str, module: nn.Module) -> MoEBlock:
    """Describe the feed-forward of a decoder layer as a block of one expert.

    `name` is that of the layer.

    Raises:
        UnsupportedStructure: it has none of a known form, several, or one with unknown parts.
    """
    found = feed_forwards(module)
    if len(found) != 1:
        raise UnsupportedStructure(f"{name} has {len(found)} feed-forwards of a known form, not 1")
    (feed_forward,) = found
    owner = feed_forward.owner
    if owner is not module:
        _refuse_unknown_parts(owner, feed_forward.projections)
    inside = next(own for own, part in module.named_modules() if part is owner)
    return MoEBlock(
        layer=layer,
        name=f"{name}.{inside}" if inside else name,
        block=owner,
        experts=owner,
        router=SingleExpertRouter(),
        shared=None,
        shared_gate=None,
        layout="dense",
        num_experts=1,
        top_k=1,
        d_model=feed_forward.d_model,
        widths=(feed_forward.width,),
        d_shared=0,
        feed_forward=feed_forward,
    )


def _first_child(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    found = (getattr(block, name, None) for name in names)
    return next((part for part in found if isinstance(part, nn.Module)), None)


def _refuse_unknown_parts(block: nn.Module, known: tuple[nn.Module | None, ...]) -> None:
    """Raise if a part with weights has an unknown role in the block's output."""
    for name, part in block.named_children():
        if part not in known and any(True for _ in part.parameters()):
            raise UnsupportedStructure(f"the role of its submodule {name} is unknown")
    # A parameter directly on the block, such as a scale of its output, is not in the formula above.
    own = [name for name, _ in block.named_parameters(recurse=False)]
    if own:
        raise UnsupportedStructure(f"the role of its parameter {own[0]} is unknown")


def _expert_layout(experts: nn.Module) -> tuple[ExpertLayout, int, tuple[int, ...]]:
    """Return layout, d_model and the width of each routed expert."""
    if isinstance(experts, RaggedExperts):
        return "ragged", experts.d_model, experts.widths
    for flag, (wanted, otherwise) in FUSED_FLAGS.items():
        if getattr(experts, flag, wanted) != wanted:
            raise UnsupportedStructure(otherwise)
    if isinstance(getattr(experts, "gate_up_proj", None), Tensor):
        return "fused", *_fused_shape(experts)
    if not isinstance(experts, nn.ModuleList):
        raise UnsupportedStructure("its weights are neither gate_up_proj and down_proj nor a list")
    # Older architectures loop over a plain ModuleList inside the block and apply the router's
    # weights there: no call exists at which an observer could see them.
    if type(experts).forward is nn.ModuleList.forward:
        raise UnsupportedStructure("its list of experts is not called with the router's weights")
    shapes = [_gated_shape(expert) for expert in experts]
    return "list", shapes[0][0], tuple(width for _, width in shapes)


def _fused_shape(experts: nn.Module) -> tuple[int, tuple[int, ...]]:
    """Check the form of a fused module and return d_model and widths."""
    # Absent flags do not mean default values: the class was not decorated, and its layout is
    # unknown.
    if not all(hasattr(experts, flag) for flag in FUSED_FLAGS):
        raise UnsupportedStructure("its fused experts do not declare their layout")
    # The decorator installs its own act(gate) ⊙ up unless the class defines `_apply_gate` (clamped
    # or sigmoid-scaled gates exist). The module of the function tells the two apart. With a
    # different gating, `ExpertView.hidden` would not be the Φ of Y = Φ W that the network computes,
    # and nothing would raise.
    gating = getattr(type(experts), "_apply_gate", None)
    if getattr(gating, "__module__", "") != "transformers.integrations.moe":
        raise UnsupportedStructure("its experts use a custom gating function")
    count, d_model, width = cast(Tensor, experts.down_proj).shape
    if tuple(cast(Tensor, experts.gate_up_proj).shape) != (count, 2 * width, d_model):
        raise UnsupportedStructure("the shapes of gate_up_proj and down_proj do not match")
    return d_model, (width,) * count


def _gated_shape(module: nn.Module) -> tuple[int, int]:
    """Return (d_model, width) of a module y = Wdown (act(Wgate x) ⊙ Wup x)."""
    linears = gated_projections(module)
    if linears is None or not hasattr(module, "act_fn"):
        raise UnsupportedStructure(f"{type(module).__name__} is not a gated feed-forward module")
    if any(linear.bias is not None for linear in linears):
        raise UnsupportedStructure(f"{type(module).__name__} has biases")
    return linears[2].out_features, linears[2].in_features


def _top_k(router: nn.Module, block: nn.Module, fallback: int | None) -> int:
    # The modules are what runs; the config is a fallback for blocks that read it in their forward.
    for owner in (router, block):
        if isinstance(getattr(owner, "top_k", None), int):
            return cast(int, owner.top_k)
    if fallback is None:
        raise UnsupportedStructure("the number of experts per token (top_k) is unknown")
    return fallback
