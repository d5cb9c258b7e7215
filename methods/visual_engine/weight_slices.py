"""Weights of one layer that visual rows need, sliced once and used by every call.

Shapes: D d_model, H query heads, h kept of them, G key-value heads, V those that kept heads read, d
a head's width, F a feed-forward's width, f kept of its neurons.

If kept heads or neurons come first, slices are views of the network's own memory. A MoE block is
replaced by one with fewer neurons per expert that shares everything else; experts may keep
different numbers of neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.errors import UserError
from bench.models.structure.expert_view import PROJECTION_NAMES, ExpertView
from bench.models.structure.moe_block import MoEBlock
from bench.models.structure.ragged_experts import RaggedExperts
from bench.models.vlm.decoder_view import AttentionView, DecoderLayer, Projection
from methods.visual_engine.settings import DroppedHeads, LayerPlan, RepairedProjections


@dataclass(frozen=True)
class Heads:
    """Heads used for visual tokens, as positions in the current weights.

    `kept` [h] and `dropped` [H - h] are query heads, `groups` [V] the key-value heads that kept
    ones read, and `reads` [h] the index in `groups` that each kept head reads. `restore` [H] undoes
    the order (kept, dropped); None if that is the network's own order. `per_group` is H / G.
    """

    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    groups: tuple[int, ...]
    reads: tuple[int, ...]
    restore: Tensor | None
    per_group: int

    @staticmethod
    def of(kept: Sequence[int], heads: int, groups: int, device: torch.device) -> Heads:
        """Derive all fields from the positions of the kept heads."""
        per_group, chosen = heads // groups, set(kept)
        dropped = tuple(head for head in range(heads) if head not in chosen)
        needed = tuple(sorted({head // per_group for head in kept}))
        order = torch.tensor((*kept, *dropped), device=device)
        in_order = order.tolist() == list(range(heads))
        return Heads(
            kept=tuple(kept),
            dropped=dropped,
            groups=needed,
            reads=tuple(needed.index(head // per_group) for head in kept),
            restore=None if in_order else order.argsort(),
            per_group=per_group,
        )


@dataclass(frozen=True)
class GatedSlice:
    """Some neurons of a gated feed-forward: Wdown (act(Wgate x) ⊙ Wup x), all of width f."""

    view: ExpertView

    def __call__(self, x_BND: Tensor) -> Tensor:
        """Return the feed-forward's output, [B, N, D]."""
        return self.view.combine(self.view.hidden(x_BND))


@dataclass(frozen=True)
class VisualWeights:
    """Weights of one layer for visual rows.

    `q` [h·d, D] projects to the queries of kept heads, followed by those of dropped heads if these
    still attend to text. `k` and `v` are [V·d, D], and `o` has the columns of the heads in `q`.
    `feed_forward` maps [..., D] to [..., D].
    """

    view: AttentionView
    heads: Heads
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    feed_forward: nn.Module | GatedSlice


def slice_weights(
    layer: DecoderLayer,
    plan: LayerPlan,
    order: Sequence[int],
    places: tuple[Tensor, ...] | None,
    dropped_heads: DroppedHeads,
    repair: RepairedProjections | None = None,
) -> VisualWeights:
    """Slice the weights of one layer for visual rows.

    `order` is the original number of the head at each position, `places` are the current positions
    of each feed-forward's kept neurons; None keeps the whole feed-forward.

    Raises:
        UserError: heads or neurons have moved since `repair` was made.
    """
    view = layer.attention_view()
    chosen = set(range(view.heads) if plan.heads is None else plan.heads)
    kept = [place for place, head in enumerate(order) if head in chosen]
    heads = Heads.of(kept, view.heads, view.groups, view.o.weight.device)
    # One projection with kept heads first: the first h heads of its output are used for visual
    # attention, the rest for attention over text alone.
    queries = (*heads.kept, *heads.dropped) if dropped_heads == "text_only" else heads.kept
    if repair is not None and not repair.fits(heads.kept, places):
        raise UserError(
            f"layer {layer.index} was changed after its projections were repaired for visual "
            "tokens: list the method with repair=true last"
        )
    o = _head_columns(view.o.weight, queries, view.head_dim)
    if repair is not None and repair.o is not None:
        o = repair.o
    return VisualWeights(
        view=view,
        heads=heads,
        q=_head_rows(view.q, queries, view.head_dim),
        k=_head_rows(view.k, heads.groups, view.head_dim),
        v=_head_rows(view.v, heads.groups, view.head_dim),
        o=Projection(o, view.o.bias),
        feed_forward=layer.feed_forward
        if places is None
        else _slice_feed_forward(layer, places, repair),
    )


def _slice_feed_forward(
    layer: DecoderLayer, places: tuple[Tensor, ...], repair: RepairedProjections | None
) -> nn.Module | GatedSlice:
    if layer.moe is not None:
        return narrow_moe_block(layer.moe, places)
    (unit,) = layer.units()
    gate, up = select_rows(unit.gate, places[0], 0), select_rows(unit.up, places[0], 0)
    down = select_rows(unit.down, places[0], 1)
    if repair is not None and repair.down is not None:
        down = repair.down
    return GatedSlice(ExpertView(gate, up, down, unit.act))


def select_rows(weight: Tensor, index: Tensor, dim: int) -> Tensor:
    """Select rows or columns of a matrix: a view if they come first, a copy otherwise."""
    count = len(index)
    # `narrow` shares memory with the network, so the slice takes none and follows later in-place
    # changes. After `WeightCache.reorder` this is the usual case; an exception are groups of heads
    # that are kept in part.
    if torch.equal(index.cpu(), torch.arange(count)):
        return weight.narrow(dim, 0, count)
    return weight.index_select(dim, index.to(weight.device))


def project(x_BRD: Tensor, projection: Projection) -> Tensor:
    """Compute x Wᵀ + b."""
    return functional.linear(x_BRD, projection.weight, projection.bias)


def head_channels(heads: Sequence[int], width: int) -> Tensor:
    """Return the channel indices of some heads."""
    first = torch.tensor(heads, dtype=torch.int64) * width
    return (first[:, None] + torch.arange(width)).flatten()


def _head_rows(projection: Projection, heads: Sequence[int], width: int) -> Projection:
    index = head_channels(heads, width)
    bias = None if projection.bias is None else select_rows(projection.bias, index, 0)
    return Projection(select_rows(projection.weight, index, 0), bias)


def _head_columns(weight: Tensor, heads: Sequence[int], width: int) -> Tensor:
    return select_rows(weight, head_channels(heads, width), 1)


HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def narrow_moe_block(block: MoEBlock, places: Sequence[Tensor]) -> nn.Module:
    """Return the block with the neurons at `places` of each expert, routed experts first.

    Router and gates are those of the block itself; expert weights are copied.
    """
    twin = _shallow_copy(block.block)
    _replace_child(twin, block.experts, _narrow_routed(block, places[: block.num_experts]))
    if block.shared is not None:
        _replace_child(twin, block.shared, _narrow_gated(block.shared, places[block.num_experts]))
    return twin


def _shallow_copy(module: nn.Module) -> nn.Module:
    """Copy a module so that its children can be replaced; the children themselves are shared."""
    # `copy.copy` shares the dictionaries of children, parameters and hooks with the original, so
    # the copy gets its own. Its hooks start empty, because observers of the original block must not
    # count calls of the copy.
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    twin.__dict__["_parameters"] = dict(module._parameters)
    for name in HOOK_TABLES:
        twin.__dict__[name] = type(getattr(module, name))()
    return twin


def _replace_child(twin: nn.Module, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, part in twin._modules.items() if part is old)
    twin._modules[name] = new


def _narrow_routed(block: MoEBlock, places: Sequence[Tensor]) -> RaggedExperts:
    """Return the routed experts with their kept neurons, however they are stored."""
    old = [block.expert(index) for index in range(block.num_experts)]
    widths = [len(kept) for kept in places]
    like = next(block.experts.parameters())
    narrow = RaggedExperts(
        widths, block.d_model, old[0].act, dtype=like.dtype, device=like.device
    ).requires_grad_(False)
    for index, (view, kept) in enumerate(zip(old, places, strict=True)):
        new, chosen = narrow.view(index), kept.to(like.device)
        new.gate.copy_(view.gate[chosen])
        new.up.copy_(view.up[chosen])
        new.down.copy_(view.down[:, chosen])
    return narrow


def _narrow_gated(module: nn.Module, kept: Tensor) -> nn.Module:
    twin = _shallow_copy(module)
    names = next(names for names in PROJECTION_NAMES if hasattr(module, names[0]))
    for name, dim in zip(names, (0, 0, 1), strict=True):
        weight = cast(nn.Linear, getattr(module, name)).weight.detach()
        twin._modules[name] = _linear(weight.index_select(dim, kept.to(weight.device)))
    return twin


def _linear(weight: Tensor) -> nn.Linear:
    # On the meta device, because the weight is replaced at once.
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
