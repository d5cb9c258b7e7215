"""A MoE block in a common form, and the check that its experts are sums of micro-experts.

A block is supported if its output is y = Σ_e A_e · Wdown_e h_e(x) plus shared experts, where each
channel of h_e depends only on one row of the expert's gate and up: usually act(Wgate_e x) ⊙
Wup_e x, in some architectures with biases, with clamps, or without a gate. The check inspects
modules instead of class names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from inspect import signature
from typing import Literal, cast

import torch
from torch import Tensor, nn

from bench.models.structure.dense_layer import (
    FeedForward,
    SingleExpertRouter,
    feed_forwards,
)
from bench.models.structure.expert_view import (
    ACTIVATION_NAMES,
    ExpertForm,
    ExpertView,
    Gating,
    flat_view,
    fused_view,
    gated_projections,
    gating_of,
    module_view,
)
from bench.models.structure.ragged_experts import NarrowedFeedForward, RaggedExperts

ExpertLayout = Literal["fused", "flat", "list", "ragged", "dense"]


@dataclass(frozen=True)
class MoEBlock:
    """One MoE block of a decoder layer, or a dense feed-forward as a block of one expert.

    `experts` takes (x [T, D], top_k_index [T, K], top_k_weights [T, K]) and returns [T, D]. Its
    weights are `fused` (all experts in 3-D parameters), `flat` (in 2-D parameters), a `list` of
    modules, or slimbench's own `ragged` form; the last two allow for different widths. `shared`
    runs on every token and is multiplied by sigmoid(shared_gate(x)) if there is a `shared_gate`; it
    is None in a block without shared experts. `shared_owner` is the module that contains it: the
    block, or the decoder layer if that adds both outputs (Granite).

    A `dense` block has a `feed_forward`, whose owner is used as block and as experts, and a router
    that is not part of the network: its only expert is always selected, with weight 1.
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
    shared_owner: nn.Module | None = None

    @property
    def d_ff(self) -> int:
        """Width of the widest routed expert; in a published network, of every routed expert."""
        return max(self.widths)

    @property
    def micro_experts(self) -> int:
        """Number of micro-experts in the block, including shared ones."""
        return self.d_shared + sum(self.widths)

    @property
    def form(self) -> ExpertForm:
        """How the matrices of an expert are stored; `plain` experts have no gate."""
        if self.feed_forward is not None:
            return self.feed_forward.form
        # From the module instead of a view, which would unpack quantized experts.
        gated = getattr(self.experts, "gated", getattr(self.experts, "has_gate", True))
        return "gated" if gated else "plain"

    @property
    def matrices(self) -> int:
        """Number of vectors of a micro-expert: 3 (gate, up, down), or 2 without a gate."""
        return 2 if self.form == "plain" else 3

    @property
    def parameters_each(self) -> int:
        """Number of weights of one micro-expert: 3·D, or 2·D without a gate, plus biases."""
        if self.feed_forward is not None:
            biases = self.feed_forward.biases
        else:
            biases = self.matrices - 1 if self.biased else 0
        return self.matrices * self.d_model + biases

    @property
    def biased(self) -> bool:
        """Whether the routed experts have biases."""
        found = getattr(self.experts, "biased", getattr(self.experts, "has_bias", False))
        return cast(bool, found)

    @property
    def gating(self) -> Gating | None:
        """How gate and up are combined, None for act(gate) · up."""
        if isinstance(self.experts, RaggedExperts):
            return self.experts.gating
        return gating_of(self.experts)

    @property
    def routed_scale(self) -> float:
        """Constant factor on the sum of the block's routed experts (Beam, Laguna).

        Most architectures scale the router's weights instead.
        """
        scale = getattr(self.block, "routed_scaling_factor", None)
        return self.shared_scale * (1.0 if scale is None else float(scale))

    @property
    def shared_scale(self) -> float:
        """Constant factor on the block's shared experts (the mean of Cohere 2)."""
        strategy = getattr(self.block, "shared_expert_combination_strategy", None)
        return 0.5 if strategy == "average" and self.shared is not None else 1.0

    @property
    def unusual(self) -> str | None:
        """Difference of its routed experts from Wdown (act(Wgate x) ⊙ Wup x), or None.

        Methods that build new experts, such as quantization, support only the usual form.
        """
        if self.layout == "dense":
            return None
        differences = {
            "no gate": self.form == "plain",
            "a gating of their own": self.gating is not None,
            "biases": self.biased,
            "one matrix for all": self.layout == "flat",
        }
        return next((name for name, found in differences.items() if found), None)

    @property
    def parameters(self) -> int:
        """Number of weights of all micro-experts, without router and gate of shared experts."""
        return self.parameters_each * self.micro_experts

    @property
    def shared_feed_forward(self) -> FeedForward | None:
        """The projections of the shared experts."""
        return None if self.shared is None else shared_feed_forward(self.shared)

    @property
    def output_module(self) -> nn.Module:
        """Module whose output is the block's."""
        # OPT has no module for the feed-forward, so the output of the down matrix is used.
        return self.block if self.feed_forward is None else self.feed_forward.down

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules of the block, without the surrounding ones."""
        if self.feed_forward is None:
            return tuple(self.block.modules())
        return self.feed_forward.projections

    def expert(self, index: int) -> ExpertView:
        """View a routed expert; writing to it changes the network."""
        if self.feed_forward is not None:
            return self.feed_forward.view()
        if self.layout == "fused":
            return fused_view(self.experts, index)
        if self.layout == "flat":
            return flat_view(self.experts, index)
        if self.layout == "ragged":
            return cast(RaggedExperts, self.experts).view(index)
        return module_view(self.experts.get_submodule(str(index)))

    def shared_view(self) -> ExpertView | None:
        """View all shared experts as one expert of width `d_shared`, or return None if none."""
        # Published blocks store several shared experts concatenated, as one wide expert.
        found = self.shared_feed_forward
        if found is None:
            return None
        # A class with its own gating implements it again in its shared experts. Observers of
        # shared experts check that both agree.
        return replace(found.view(), gating=self.gating)


ROUTER_NAMES = ("gate", "router")
SHARED_NAMES = ("shared_expert", "shared_experts", "shared_mlp")
SHARED_GATE_NAME = "shared_expert_gate"
# Parts that are added to the scores only for selecting experts, not for their weights.
CHOICE_BIAS_NAMES = ("e_score_correction_bias", "expert_bias")

# Parameter of fused experts that reads the input: with a gate, and without one.
FUSED_INPUT_NAMES = ("gate_up_proj", "up_proj")
# Attributes that transformers' `use_experts_implementation` sets on a fused module.
FUSED_FLAGS = {"is_transposed", "is_concatenated", "has_bias", "has_gate", "has_post_expert_norm"}


class UnsupportedStructure(Exception):
    """A block's experts have an unsupported form; the message states the difference."""


def moe_block_of(
    index: int, name: str, block: nn.Module, layer: nn.Module, top_k: int | None
) -> MoEBlock:
    """Describe a block of a decoder layer that has `experts`.

    `top_k` is the value of the network's config, used if neither router nor block has one.

    Raises:
        UnsupportedStructure: its output is not a sum of micro-experts.
    """
    experts = cast(nn.Module, block.experts)
    if block is layer:
        raise UnsupportedStructure("the layer itself holds experts, and norms follow them")
    router = _first_child(block, ROUTER_NAMES)
    if router is None:
        raise UnsupportedStructure("it has no router named gate or router")
    shared, owner = _find_shared(block, layer)
    shared_gate = _first_child(block, (SHARED_GATE_NAME,))
    _refuse_unknown_parts(block, (experts, router, shared, shared_gate))
    layout, d_model, widths = _expert_layout(experts)
    described = MoEBlock(
        layer=index,
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
        d_shared=0 if shared is None else shared_feed_forward(shared).width,
        shared_owner=owner,
    )
    beside = described.shared_feed_forward
    if beside is not None and (beside.form == "plain") != (described.form == "plain"):
        # A micro-expert would have two vectors in one kind of experts and three in the other.
        raise UnsupportedStructure("only one of its routed and shared experts has a gate")
    return described


def _find_shared(block: nn.Module, layer: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the shared experts of a block and the module that contains them."""
    inside = _first_child(block, SHARED_NAMES)
    if inside is not None:
        return inside, block
    # Beside the block, the layer runs both on the same input and adds them; names differ. Two
    # feed-forwards in a list (LongCat) run one after the other and are dense.
    beside = [part for part in layer.children() if part is not block and _is_feed_forward(part)]
    if len(beside) > 1:
        raise UnsupportedStructure("several feed-forwards are beside it")
    return (beside[0], layer) if beside else (None, None)


def _is_feed_forward(module: nn.Module) -> bool:
    if isinstance(module, NarrowedFeedForward):
        return True
    return any(found.owner is module for found in feed_forwards(module))


def shared_feed_forward(shared: nn.Module) -> FeedForward:
    """Return the projections of shared experts.

    Raises:
        UnsupportedStructure: they are not a feed-forward of a known form, or have biases.
    """
    found = feed_forwards(shared)
    if len(found) != 1:
        raise UnsupportedStructure(f"{type(shared).__name__} is not a feed-forward of a known form")
    if any(projection.bias is not None for projection in found[0].projections):
        raise UnsupportedStructure(f"{type(shared).__name__} has biases")
    return found[0]


def dense_block_of(layer: int, name: str, module: nn.Module) -> MoEBlock:
    """Describe the feed-forward of a decoder layer as a block of one expert.

    `name` is that of the layer.

    Raises:
        UnsupportedStructure: it has not exactly one feed-forward of a known form, or the
            feed-forward has unknown parts.
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
    """Raise if the role of a part with weights in the block's output is unknown."""
    for name, part in block.named_children():
        if part not in known and any(True for _ in part.parameters()):
            raise UnsupportedStructure(f"the role of its submodule {name} is unknown")
    # A parameter of the block itself, such as a scale of its output, is not in the formula above.
    own = {name for name, _ in block.named_parameters(recurse=False)} - {*CHOICE_BIAS_NAMES}
    if own:
        raise UnsupportedStructure(f"the role of its parameter {min(own)} is unknown")


# Names of the parts of a block that state its number of experts.
EXPERT_COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _expert_layout(experts: nn.Module) -> tuple[ExpertLayout, int, tuple[int, ...]]:
    """Return layout, d_model and the width of each routed expert."""
    if isinstance(experts, RaggedExperts):
        return "ragged", experts.d_model, experts.widths
    if any(isinstance(getattr(experts, name, None), Tensor) for name in FUSED_INPUT_NAMES):
        return "fused", *_fused_shape(experts)
    flat = getattr(experts, "mlp", None)
    if all(isinstance(getattr(flat, name, None), Tensor) for name in ("w1", "v1", "w2")):
        return "flat", *_flat_shape(experts)
    if not isinstance(experts, nn.ModuleList):
        raise UnsupportedStructure("its weights are neither gate_up_proj and down_proj nor a list")
    # Older architectures loop over a plain ModuleList in the block and apply the router's weights
    # there, so no call exists that an observer could hook.
    if type(experts).forward is nn.ModuleList.forward:
        raise UnsupportedStructure("its list of experts is not called with the router's weights")
    shapes = [_gated_shape(expert) for expert in experts]
    return "list", shapes[0][0], tuple(width for _, width in shapes)


def _fused_shape(experts: nn.Module) -> tuple[int, tuple[int, ...]]:
    """Check the form of a fused module and return d_model and widths."""
    if len(signature(experts.forward).parameters) == 1:
        # Llama 4 scales the experts' inputs: act depends on the weight, and φ is not A · h.
        raise UnsupportedStructure("its experts are called without the router's weights")
    # Absent flags do not imply default values: the class is not decorated, and its layout is
    # unknown.
    if not all(hasattr(experts, flag) for flag in FUSED_FLAGS):
        raise UnsupportedStructure("its fused experts do not declare their layout")
    if experts.has_post_expert_norm:
        raise UnsupportedStructure("a norm follows each expert")
    count = len(cast(Tensor, experts.down_proj))
    view = fused_view(experts, 0)
    d_model, width = view.down.shape
    if view.up.shape != (width, d_model) or len(view.gate) not in (0, width):
        raise UnsupportedStructure("the shapes of its matrices do not match")
    if view.gating is not None and not _channels_stand_alone(view.gating):
        raise UnsupportedStructure("its experts combine their channels")
    return d_model, (width,) * count


def _channels_stand_alone(gating: Gating) -> bool:
    """Return whether channel c of a gating's result depends only on channel c of gate and up."""
    # Otherwise φ would not be a coefficient of one micro-expert. Tested numerically, because a
    # class may compute anything.
    gate_SF, up_SF = torch.linspace(-3, 3, 24, device="cpu").view(2, 3, 4)
    whole_SF = gating(gate_SF, up_SF)
    if whole_SF.shape != gate_SF.shape:
        return False
    order, kept = torch.tensor([[2, 0, 3, 1], [0, 0, 1, 0]], device="cpu")
    moved_SF = gating(gate_SF[:, order], up_SF[:, order])
    alone_SF = gating(gate_SF.where(kept > 0, 9.0), up_SF.where(kept > 0, -9.0))
    return torch.equal(moved_SF, whole_SF[:, order]) and torch.equal(alone_SF[:, 2], whole_SF[:, 2])


def _flat_shape(experts: nn.Module) -> tuple[int, tuple[int, ...]]:
    """Return d_model and widths of experts that are rows of one matrix."""
    view = flat_view(experts, 0)
    width, d_model = view.gate.shape
    rows = len(cast(Tensor, cast(nn.Module, experts.mlp).w1))
    return d_model, (width,) * (rows // width)


def _gated_shape(module: nn.Module) -> tuple[int, int]:
    """Return (d_model, width) of a module y = Wdown (act(Wgate x) ⊙ Wup x)."""
    linears = gated_projections(module)
    if linears is None or not any(hasattr(module, name) for name in ACTIVATION_NAMES):
        raise UnsupportedStructure(f"{type(module).__name__} is not a gated feed-forward module")
    if any(linear.bias is not None for linear in linears):
        raise UnsupportedStructure(f"{type(module).__name__} has biases")
    return linears[2].out_features, linears[2].in_features


def _top_k(router: nn.Module, block: nn.Module, fallback: int | None) -> int:
    # The modules are what runs; the config is used for blocks that read it in their forward.
    for owner in (router, block):
        if isinstance(getattr(owner, "top_k", None), int):
            return cast(int, owner.top_k)
    if fallback is None:
        raise UnsupportedStructure("the number of experts per token (top_k) is unknown")
    return fallback
