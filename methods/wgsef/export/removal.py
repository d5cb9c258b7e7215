"""Physical removal: the network without its dead groups, with the same outputs.

Shapes: M groups of a family.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.errors import UserError
from methods.wgsef.groups.family import Family


@dataclass(frozen=True)
class Removal:
    """The smaller network, its new weight shapes by layer, and the names of removed branches.

    `kept` is the number of groups left in each family, after rounding.
    """

    network: nn.Module
    shapes: dict[str, tuple[int, ...]]
    branches: tuple[str, ...]
    kept: dict[str, int]


def remove(
    network: nn.Module, families: Sequence[Family], dead: Sequence[Tensor], multiple: int = 1
) -> Removal:
    """Return a copy of the network without the groups that `dead` marks, one [M] per family.

    Each family keeps at least one group. Kept counts are rounded up to a multiple (8 or 64 suit
    most kernels) as far as the family has groups; some zero groups then stay.

    Raises:
        UserError: groups of this kind cannot be removed, or a dead one is not zero.
    """
    _refuse(network, families, dead)
    smaller = copy.deepcopy(network)
    gone: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    branches: list[str] = []
    kept = {}
    for family, dead_M in zip(families, dead, strict=True):
        if family.kind == "depth":
            leaving_M, parts = dead_M, family.owned
            branches += _branches(family, dead_M)
        else:
            leaving_M, parts = _rounded(dead_M, multiple), (*family.owned, *family.readers)
            for part in parts:
                # Indices are collected first and cut once per tensor and axis: cutting family by
                # family would shift the units of the next one.
                gone[part.tensor, part.axes[0]].append(part.units_of(leaving_M))
        kept[family.name] = int((~leaving_M).sum())
    layers = _cut(smaller, gone)
    shapes = {n: tuple(smaller.get_submodule(n).get_parameter("weight").shape) for n in layers}
    for name in branches:
        parent, _, leaf = name.rpartition(".")
        setattr(smaller.get_submodule(parent), leaf, None)
    return Removal(smaller, shapes, tuple(branches), kept)


def _refuse(network: nn.Module, families: Sequence[Family], dead: Sequence[Tensor]) -> None:
    """Raise for groups that cannot be removed or whose weights are not zero."""
    tensors = dict(network.named_parameters())
    for family, dead_M in zip(families, dead, strict=True):
        if family.removable is not None and bool(dead_M.any()):
            raise UserError(f"the {family.kind} of {family.name} stay zeroed: {family.removable}")
        for part in family.owned:
            units = part.units_of(dead_M)
            if part.axes:
                living = tensors[part.tensor].detach().movedim(part.axes[0], 0)[units]
            else:
                # Without axes the tensor is a single unit: the factor is 1 if its group is dead,
                # else 0.
                living = tensors[part.tensor].detach() * len(units)
            if bool(living.any()):
                raise UserError(f"{family.name} has a group marked dead whose weights are not zero")


def _rounded(dead_M: Tensor, multiple: int) -> Tensor:
    """Return the groups to remove so that the kept count is a multiple; the first dead stay."""
    alive = int((~dead_M).sum())
    wanted = min(len(dead_M), max(1, math.ceil(alive / multiple)) * multiple)
    place_M = dead_M.int().cumsum(0)
    return dead_M & (place_M > wanted - alive)


def _branches(family: Family, dead_M: Tensor) -> list[str]:
    """Return the names of the residual branches whose groups are dead."""
    dead_groups = set(dead_M.nonzero()[:, 0].tolist())
    owners = [p.tensor for p in family.owned if int(p.groups[0]) in dead_groups]
    # A parameter inside a branch names it by its path; several parameters give one branch.
    names = (tensor[: tensor.index(".branch.") + len(".branch")] for tensor in owners)
    return list(dict.fromkeys(names))


def _cut(network: nn.Module, gone: dict[tuple[str, int], list[Tensor]]) -> list[str]:
    """Delete units of tensors axis by axis, and return the names of the layers that shrank."""
    layers: dict[str, None] = {}
    for (tensor, axis), parts in gone.items():
        name, _, key = tensor.rpartition(".")
        layer = network.get_submodule(name)
        old = getattr(layer, key)
        leave = torch.zeros(old.shape[axis], dtype=torch.bool, device=old.device)
        leave[torch.cat(parts).to(old.device)] = True
        if not bool(leave.any()):
            continue
        left = old.detach().index_select(axis, (~leave).nonzero()[:, 0])
        if isinstance(old, nn.Parameter):
            setattr(layer, key, nn.Parameter(left, requires_grad=old.requires_grad))
        else:
            # BatchNorm's running statistics shrink with its weights.
            layer.register_buffer(key, left)
        layers[name] = None
    for name in layers:
        _recount(network.get_submodule(name))
    return list(layers)


def _recount(layer: nn.Module) -> None:
    """Make a layer's own size attributes agree with its weight."""
    if isinstance(layer, nn.Conv2d):
        if layer.groups > 1:
            # A depthwise convolution stays depthwise: one group per remaining channel.
            layer.groups = layer.weight.shape[0]
        layer.out_channels = layer.weight.shape[0]
        layer.in_channels = layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.BatchNorm2d):
        layer.num_features = layer.weight.shape[0]
