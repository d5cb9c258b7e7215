"""Weights that visual rows need in one layer, sliced once and used by every call.

Shapes: D d_model, H query heads, h kept of them, G key-value heads, V those that kept heads read, d
a head's width, F a feed-forward's width, f kept of its neurons.

If kept heads or neurons come first, slices are views of the network's own memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.errors import UserError
from bench.models.anatomy import ExpertView
from bench.models.multimodal.decoder import AttentionView, DecoderLayer, Projection
from methods.visual_tokens.narrowing import narrowed
from methods.visual_tokens.plan import Dropped, LayerPlan


@dataclass(frozen=True)
class Heads:
    """Heads used for visual tokens, as positions in the weights as they are now.

    `kept` [h] and `dropped` [H - h] are query heads, `groups` [V] the key-value heads that kept
    ones read; `reads` [h] is the index in `groups` that each kept head reads; `restore` [H] undoes
    the order (kept, dropped), None if it is the network's own; `per_group` is H / G.
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
class VisualWeights:
    """Weights of one layer for visual rows.

    `q` [h·d, D] makes the kept heads' queries, followed by the dropped heads' if those still attend
    to text; `k` and `v` are [V·d, D], and `o` has the columns of the heads in `q`. `feed_forward`
    maps [..., D] to [..., D].
    """

    view: AttentionView
    heads: Heads
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    feed_forward: nn.Module | GatedSlice


@dataclass(frozen=True)
class GatedSlice:
    """Some neurons of a gated feed-forward: Wdown (act(Wgate x) ⊙ Wup x), all of width f."""

    view: ExpertView

    def __call__(self, x_BND: Tensor) -> Tensor:
        """Return the feed-forward's output, [B, N, D]."""
        return self.view.combine(self.view.hidden(x_BND))


@dataclass(frozen=True)
class Repair:
    """Columns of one layer's projections, refitted for visual rows by least squares.

    `o` [D, h·d] are those of the kept heads at the positions `heads`, `down` [D, f] those of a
    dense feed-forward's neurons at the positions `neurons`; None if not refitted.
    """

    heads: tuple[int, ...]
    o: Tensor | None
    neurons: Tensor | None
    down: Tensor | None

    def fits(self, heads: tuple[int, ...], places: tuple[Tensor, ...] | None) -> bool:
        """Whether the kept heads and neurons are still where the columns were refitted."""
        # Positions, not numbers: the columns are stored in the order of the weights, which
        # reordering or removing neurons afterwards would change.
        if self.down is None:
            return self.o is None or heads == self.heads
        assert self.neurons is not None
        same = places is not None and torch.equal(places[0].cpu(), self.neurons.cpu())
        return same and (self.o is None or heads == self.heads)


def cut_out(
    layer: DecoderLayer,
    plan: LayerPlan,
    order: Sequence[int],
    places: tuple[Tensor, ...] | None,
    dropped: Dropped,
    repair: Repair | None = None,
) -> VisualWeights:
    """Slice the weights of one layer for visual rows.

    `order` is the head of the loaded network at each position, `places` the present positions of
    each feed-forward's kept neurons; None keeps the whole feed-forward.

    Raises:
        UserError: heads or neurons are no longer where they were when `repair` was made.
    """
    view = layer.attention_view()
    chosen = set(range(view.heads) if plan.heads is None else plan.heads)
    kept = [place for place, head in enumerate(order) if head in chosen]
    heads = Heads.of(kept, view.heads, view.groups, view.o.weight.device)
    # Kept heads first, in one projection: the first h heads of its output go to visual attention,
    # the rest to attention over text alone.
    queries = (*heads.kept, *heads.dropped) if dropped == "text" else heads.kept
    if repair is not None and not repair.fits(heads.kept, places):
        raise UserError(
            f"layer {layer.index} was changed after its projections were repaired for visual "
            "tokens: list the method with repair=true last"
        )
    o = _columns(view.o.weight, queries, view.head_dim)
    if repair is not None and repair.o is not None:
        o = repair.o
    return VisualWeights(
        view=view,
        heads=heads,
        q=_outputs(view.q, queries, view.head_dim),
        k=_outputs(view.k, heads.groups, view.head_dim),
        v=_outputs(view.v, heads.groups, view.head_dim),
        o=Projection(o, view.o.bias),
        feed_forward=layer.feed_forward if places is None else _neurons(layer, places, repair),
    )


def _neurons(
    layer: DecoderLayer, places: tuple[Tensor, ...], repair: Repair | None
) -> nn.Module | GatedSlice:
    if layer.moe is not None:
        return narrowed(layer.moe, places)
    (unit,) = layer.units()
    gate, up = pick(unit.gate, places[0], 0), pick(unit.up, places[0], 0)
    down = pick(unit.down, places[0], 1)
    if repair is not None and repair.down is not None:
        down = repair.down
    return GatedSlice(ExpertView(gate, up, down, unit.act))


def pick(weight: Tensor, index: Tensor, dim: int) -> Tensor:
    """Select rows or columns of a matrix: a view if they come first, a copy otherwise."""
    count = len(index)
    # `narrow` shares memory with the network, so the slice costs none and follows later in-place
    # changes; after `reorder` every slice takes this path, up to groups that are kept in part.
    if torch.equal(index.cpu(), torch.arange(count)):
        return weight.narrow(dim, 0, count)
    return weight.index_select(dim, index.to(weight.device))


def project(x_BRD: Tensor, projection: Projection) -> Tensor:
    """Compute x Wᵀ + b."""
    return functional.linear(x_BRD, projection.weight, projection.bias)


def spans(heads: Sequence[int], width: int) -> Tensor:
    """Return the channel indices of some heads."""
    first = torch.tensor(heads, dtype=torch.int64) * width
    return (first[:, None] + torch.arange(width)).flatten()


def _outputs(projection: Projection, heads: Sequence[int], width: int) -> Projection:
    index = spans(heads, width)
    bias = None if projection.bias is None else pick(projection.bias, index, 0)
    return Projection(pick(projection.weight, index, 0), bias)


def _columns(weight: Tensor, heads: Sequence[int], width: int) -> Tensor:
    return pick(weight, spans(heads, width), 1)
