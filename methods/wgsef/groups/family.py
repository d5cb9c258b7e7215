"""Groups as parts of tensors: slices, and families of groups of one kind.

A family holds the groups of one kind in one place, such as the filters of one convolution with
everything coupled to them. Its groups own slices, which are measured, shrunk and zeroed; an element
belongs to at most one group. They also have readers: slices that have no effect once the group is
zero and that are removed with it, such as the input channels of the next layer.

Shapes: R listed units, M groups of a family, U units of a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal[
    "filters",
    "channels",
    "filter_shapes",
    "weights",
    "depth",
    "neurons",
    "heads",
    "experts",
    "micro_experts",
]


@dataclass(frozen=True, eq=False)
class Slice:
    """Units of one tensor and the groups to which they belong.

    The tensor's `axes`, in ascending order and flattened together, number its units; all remaining
    axes lie inside a unit. A filter of a convolution is a unit of axes (0,), a channel of (1,), a
    filter shape of (1, 2, 3), a single weight of all axes, and the whole tensor of none. Unit
    `units[r]` belongs to group `groups[r]`; both are [R] int64.
    """

    tensor: str
    axes: tuple[int, ...]
    units: Tensor
    groups: Tensor

    @classmethod
    def whole(cls, tensor: str, axes: tuple[int, ...], groups: int, repeat: int = 1) -> Slice:
        """Return the slice in which each group has `repeat` consecutive units."""
        unit_R = torch.arange(groups * repeat)
        return cls(tensor, axes, unit_R, unit_R // repeat)

    def units_of(self, dead_M: Tensor) -> Tensor:
        """Return the units of the groups that `dead_M` marks."""
        return self.units[dead_M.to(self.groups.device)[self.groups]]


@dataclass(frozen=True, eq=False)
class Family:
    """M groups of one kind in one place.

    `owned` is measured and shrunk; `readers` is only cut when groups are removed. `removable` is
    None if the groups can be removed from the network, otherwise the reason why they cannot.
    """

    name: str
    kind: Kind
    groups: int
    owned: tuple[Slice, ...]
    readers: tuple[Slice, ...] = ()
    removable: str | None = None


def unit_count(shape: torch.Size, axes: tuple[int, ...]) -> int:
    """Return the number of units of a tensor of this shape."""
    count = 1
    for axis in axes:
        count *= shape[axis]
    return count


def inside(shape: torch.Size, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes that lie inside a unit."""
    return tuple(axis for axis in range(len(shape)) if axis not in axes)


def spread(unit_U: Tensor, shape: torch.Size, axes: tuple[int, ...]) -> Tensor:
    """Return one value per unit in a shape that broadcasts over the tensor."""
    # Ascending `axes` make this reshape agree with the flattened numbering of units.
    return unit_U.reshape([size if axis in axes else 1 for axis, size in enumerate(shape)])
