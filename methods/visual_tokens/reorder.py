"""Moving kept heads and neurons to the front, so that slices of weights are views, not copies.

An exact change of parameters: the network computes the same function. Shapes: D d_model, H query
heads, G key-value heads, d a head's width, F a feed-forward's width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from bench.models.anatomy import ExpertView
from bench.models.multimodal.decoder import AttentionView, Projection


def front_heads(kept: Collection[int], order: Sequence[int], per_group: int) -> list[int]:
    """Return places of heads with the kept ones first, as far as key-value groups allow.

    `order` says which head is at each place; `kept` are heads. Groups stay together: those with a
    kept head come first, and inside a group its kept heads do.
    """
    groups = [
        range(first, first + per_group) for first in range(0, len(order), per_group)
    ]  # places of each group
    inside = [sorted(group, key=lambda place: order[place] not in kept) for group in groups]
    inside.sort(key=lambda group: order[group[0]] not in kept)
    return [place for group in inside for place in group]


@torch.no_grad()
def move_heads(view: AttentionView, places: Sequence[int]) -> None:
    """Rearrange a layer's heads in place; `places` [H] are the old places in their new order."""
    per_group = view.heads // view.groups
    groups = [places[first] // per_group for first in range(0, view.heads, per_group)]
    for projection, moved in ((view.q, places), (view.k, groups), (view.v, groups)):
        _rearrange(projection, _components(moved, view.head_dim))
    o_DE = view.o.weight
    o_DE.copy_(o_DE[:, _components(places, view.head_dim).to(o_DE.device)])


@torch.no_grad()
def move_neurons(unit: ExpertView, places_F: Tensor) -> None:
    """Rearrange the neurons of a gated feed-forward in place."""
    places_F = places_F.to(unit.gate.device)
    unit.gate.copy_(unit.gate[places_F])
    unit.up.copy_(unit.up[places_F])
    unit.down.copy_(unit.down[:, places_F])


def _rearrange(projection: Projection, rows: Tensor) -> None:
    """Rearrange the outputs of a projection."""
    for part in (projection.weight, projection.bias):
        if part is not None:
            part.copy_(part[rows.to(part.device)])


def _components(heads: Sequence[int], width: int) -> Tensor:
    """Return the indices of all components of some heads."""
    return (torch.tensor(heads)[:, None] * width + torch.arange(width)).flatten()
