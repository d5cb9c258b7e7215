"""Whether the experts of a MoE block are of the kind that methods can reason about.

A block is understood when its output is y = Σ_e A_e · Wdown_e (act(Wgate_e x) ⊙ Wup_e x), plus
shared experts of the same form. It is decided by looking at the modules, not at class names.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from bench.models.anatomy.expert import projections
from bench.models.anatomy.moe import Layout, MoEBlock
from bench.models.anatomy.ragged import RaggedExperts

ROUTERS = ("gate", "router")
SHARED = ("shared_expert", "shared_experts", "shared_mlp")
SHARED_GATE = "shared_expert_gate"
# What transformers' `use_experts_implementation` says about a fused layout, and what we need.
FUSED_FLAGS = {
    "is_transposed": (False, "its weights are transposed"),
    "is_concatenated": (True, "its gate and up rows are interleaved"),
    "has_bias": (False, "its experts have biases"),
    "has_gate": (True, "its experts have no gate matrix"),
    "has_post_expert_norm": (False, "a norm follows each expert"),
}


class NotUnderstoodError(Exception):
    """The experts of a block are of another kind; the message says what is different."""


def understand(layer: int, name: str, block: nn.Module, top_k: int | None) -> MoEBlock:
    """Describe a block that has `experts`; raise `NotUnderstoodError` if they are of another kind.

    `top_k` is what the network's config says, used where the router does not say it itself.
    """
    experts = cast(nn.Module, block.experts)
    router = _child(block, ROUTERS)
    if router is None:
        raise NotUnderstoodError("it has no router named gate or router")
    shared, shared_gate = _child(block, SHARED), _child(block, (SHARED_GATE,))
    _refuse_unknown_parts(block, (experts, router, shared, shared_gate))
    layout, d_model, widths = _routed(experts)
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
        d_shared=0 if shared is None else _gated(shared)[1],
    )


def _child(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """Return the first child module that has one of the names."""
    found = (getattr(block, name, None) for name in names)
    return next((part for part in found if isinstance(part, nn.Module)), None)


def _refuse_unknown_parts(block: nn.Module, known: tuple[nn.Module | None, ...]) -> None:
    """Raise when the block has weights in a part whose role in its output is not known."""
    for name, part in block.named_children():
        if part not in known and any(True for _ in part.parameters()):
            raise NotUnderstoodError(f"the role of its part {name} is not known")
    own = [name for name, _ in block.named_parameters(recurse=False)]
    if own:
        raise NotUnderstoodError(f"the role of its parameter {own[0]} is not known")


def _routed(experts: nn.Module) -> tuple[Layout, int, tuple[int, ...]]:
    """Return layout, d_model and the width of each routed expert."""
    if isinstance(experts, RaggedExperts):
        return "ragged", experts.d_model, experts.widths
    for flag, (wanted, otherwise) in FUSED_FLAGS.items():
        if getattr(experts, flag, wanted) != wanted:
            raise NotUnderstoodError(otherwise)
    if isinstance(getattr(experts, "gate_up_proj", None), Tensor):
        return "fused", *_fused(experts)
    if not isinstance(experts, nn.ModuleList):
        raise NotUnderstoodError("its weights are neither gate_up_proj and down_proj nor a list")
    if type(experts).forward is nn.ModuleList.forward:
        raise NotUnderstoodError("its list of experts does not receive the router's weights")
    shapes = [_gated(expert) for expert in experts]
    return "list", shapes[0][0], tuple(width for _, width in shapes)


def _fused(experts: nn.Module) -> tuple[int, tuple[int, ...]]:
    """Return d_model and widths of a fused module after checking that its form is the known one."""
    if not all(hasattr(experts, flag) for flag in FUSED_FLAGS):
        raise NotUnderstoodError("its fused experts do not declare their layout")
    gating = getattr(type(experts), "_apply_gate", None)
    if getattr(gating, "__module__", "") != "transformers.integrations.moe":
        raise NotUnderstoodError("its experts use a gating of their own")
    count, d_model, width = cast(Tensor, experts.down_proj).shape
    if tuple(cast(Tensor, experts.gate_up_proj).shape) != (count, 2 * width, d_model):
        raise NotUnderstoodError("the shapes of gate_up_proj and down_proj do not fit")
    return d_model, (width,) * count


def _gated(module: nn.Module) -> tuple[int, int]:
    """Return (d_model, width) of a feed-forward module y = Wdown (act(Wgate x) ⊙ Wup x)."""
    linears = projections(module)
    if linears is None or not hasattr(module, "act_fn"):
        raise NotUnderstoodError(f"{type(module).__name__} is not a gated feed-forward module")
    if any(linear.bias is not None for linear in linears):
        raise NotUnderstoodError(f"{type(module).__name__} has biases")
    return linears[2].out_features, linears[2].in_features


def _top_k(router: nn.Module, block: nn.Module, fallback: int | None) -> int:
    """Return how many experts a token goes to."""
    for owner in (router, block):
        if isinstance(getattr(owner, "top_k", None), int):
            return cast(int, owner.top_k)
    if fallback is None:
        raise NotUnderstoodError("it does not say how many experts a token goes to")
    return fallback
