"""Permutations that move kept heads and neurons to the front, so weight slices are views.

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
    """Return positions of heads with kept ones first, as far as key-value groups allow.

    `order` is the head at each position; `kept` are heads. Groups stay together: those with a kept
    head come first, and in each group its kept heads do.
    """
    # Groups stay whole because query head i reads key-value head i // per_group: moved alone, it
    # would read different keys. K and V are therefore sliced by group, all groups with a kept head,
    # and kept query heads are contiguous only within their groups.
    groups = [range(first, first + per_group) for first in range(0, len(order), per_group)]
    inside = [sorted(group, key=lambda place: order[place] not in kept) for group in groups]
    inside.sort(key=lambda group: order[group[0]] not in kept)
    return [place for group in inside for place in group]


@torch.no_grad()
def move_heads(view: AttentionView, places: Sequence[int]) -> None:
    """Permute a layer's heads in place; `places` [H] are the old positions in new order."""
    per_group = view.heads // view.groups
    # Query heads of a group stay adjacent, so the first one of each gives the group's new place.
    groups = [places[first] // per_group for first in range(0, view.heads, per_group)]
    for projection, moved in ((view.q, places), (view.k, groups), (view.v, groups)):
        _rearrange(projection, _components(moved, view.head_dim))
    o_DE = view.o.weight
    o_DE.copy_(o_DE[:, _components(places, view.head_dim).to(o_DE.device)])


@torch.no_grad()
def move_neurons(unit: ExpertView, places_F: Tensor) -> None:
    """Permute the neurons of a gated feed-forward in place."""
    places_F = places_F.to(unit.gate.device)
    unit.gate.copy_(unit.gate[places_F])
    unit.up.copy_(unit.up[places_F])
    unit.down.copy_(unit.down[:, places_F])


def _rearrange(projection: Projection, rows: Tensor) -> None:
    for part in (projection.weight, projection.bias):
        if part is not None:
            part.copy_(part[rows.to(part.device)])


def _components(heads: Sequence[int], width: int) -> Tensor:
    """Return the channel indices of some heads."""
    return (torch.tensor(heads)[:, None] * width + torch.arange(width)).flatten()
