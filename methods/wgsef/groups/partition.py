"""Groups of a network as parts of its tensors, and operations on all of them at once.

Shapes: M groups of all families (or of one), family by family; L families, N groups of the largest
family (families are padded to N with empty groups); R listed units of all slices; U units of a
tensor.

A family holds the groups of one kind and layer, such as the filters of one convolution with
everything coupled to them. Its groups own slices of parameters, which are measured, shrunk and
zeroed; an element belongs to at most one group. Groups also have reader slices, such as the input
channels of the next layer, which have no effect once the group is zero and are removed with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from bench.errors import UserError
from bench.models.classifiers.pruned_modules import Shortcut

ElementFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class _BoundSlice:
    """A slice with values precomputed from the shape of its parameter.

    `inner` are the axes inside a unit, `outline` is the shape in which one value per unit
    broadcasts over the parameter. `units` is None if the slice lists all `count` units in order.
    """

    tensor: str
    inner: tuple[int, ...]
    outline: list[int]
    count: int
    units: Tensor | None


class GroupPartition:
    """The groups of `families` in a network, whose parameters must not be replaced afterwards.

    Raises:
        UserError: there are no groups, or two groups own the same weight.
    """

    def __init__(self, network: nn.Module, families: Sequence[GroupFamily]) -> None:
        if not families:
            raise UserError(f"{type(network).__name__} has no groups that can be pruned")
        self.families = tuple(families)
        self.parameters = dict(network.named_parameters())
        refuse_overlap(self.parameters, self.families)
        self.sizes = [family.groups for family in self.families]
        self.groups = sum(self.sizes)
        self.device = next(iter(self.parameters.values())).device
        self._index()
        # The group sizes |s_j|, which group lasso uses as weights.
        self.elements_M = self.sum(torch.ones_like)

    def sum(self, element: ElementFunction) -> Tensor:
        """Return the sum over each group of `element(parameter)`, [M] fp64.

        `element` maps a parameter to a tensor of its shape, such as its Adam metric.
        """
        return self.sum_named(lambda name: element(self.parameters[name]))

    def sum_named(self, element: Callable[[str], Tensor]) -> Tensor:
        """Return the sum over each group of `element(parameter name)`, [M] fp64."""
        parts = []
        for part in self._parts:
            value = element(part.tensor).detach()
            # With no axes, `sum` would sum over all of them.
            parts.append((value.sum(part.inner) if part.inner else value).flatten())
        return self._gather(parts)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return the Euclidean norm of each group, [M] fp64."""
        parts = []
        for part in self._parts:
            weight: Tensor = self.parameters[part.tensor]
            if part.inner:
                # Accumulates bf16 weights in fp32 without a cast of the whole tensor.
                weight = torch.linalg.vector_norm(weight, dim=part.inner, dtype=torch.float32)
            # In a small network kernel launches dominate, so a needless reshape costs time.
            parts.append(weight if weight.ndim == 1 else weight.reshape(-1))
        return self._gather(parts, square=True).sqrt_()

    @torch.no_grad()
    def scale_(self, scale_M: Tensor) -> None:
        """Multiply all weights of each group by its factor, in place."""
        weights: list[Tensor] = []
        scales: list[Tensor] = []
        for name, scale in self._per_slice(scale_M, fill=1.0):
            weights.append(self.parameters[name])
            scales.append(scale)
        # One call instead of a Python loop over slices. A parameter owned by several families is
        # listed several times; because the factors broadcast, torch multiplies one after the other
        # and no update is lost.
        torch._foreach_mul_(weights, scales)

    @torch.no_grad()
    def add_(self, factor_M: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Add to the weights of each group its factor times the tensor of their parameter."""
        for name, factor in self._per_slice(factor_M, fill=0.0):
            self.parameters[name].addcmul_(tensors[name], factor)

    @torch.no_grad()
    def add_to_gradients_(self, factor_M: Tensor) -> None:
        """Add to the gradients of each group its factor times its weights."""
        for name, factor in self._per_slice(factor_M, fill=0.0):
            weight = self.parameters[name]
            if weight.grad is not None:
                weight.grad.addcmul_(weight, factor)

    def expand_to_weights(self, values_M: Tensor) -> dict[str, Tensor]:
        """Return each group's value at all of its weights, per owned parameter; 0 elsewhere."""
        whole = {n: torch.zeros_like(p) for n, p in self.owned_parameters().items()}
        for name, value in self._per_slice(values_M, fill=0.0):
            # Units that a slice does not list are filled with 0, so slices of different families
            # add up.
            whole[name] += value
        return whole

    def owned_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that have groups, by name."""
        return {part.tensor: self.parameters[part.tensor] for part in self._parts}

    def copy_weights(self) -> dict[str, Tensor]:
        """Return copies of the parameters that have groups, by name."""
        return {name: p.detach().clone() for name, p in self.owned_parameters().items()}

    def alive(self) -> Tensor:
        """Return a mask [M] of the groups with at least one non-zero weight."""
        return self.sum(lambda weight: (weight.detach() != 0).float()) > 0

    def split(self, values_M: Tensor) -> list[Tensor]:
        """Return the values family by family."""
        return list(values_M.split(self.sizes))

    def pad_by_family(self, values_M: Tensor) -> Tensor:
        """Return the values as [L, N], one row per family, padded with zeros."""
        flat = values_M.new_zeros(len(self.sizes) * max(self.sizes))
        return flat.index_copy_(0, self._padded_M, values_M).reshape(len(self.sizes), -1)

    def unpad(self, values_LN: Tensor) -> Tensor:
        """Return values in the layout of `pad_by_family` as [M]."""
        return values_LN.flatten()[self._padded_M]

    def _index(self) -> None:
        """Precompute the positions of units, groups and rows in the flat vectors."""
        # All units of all slices form one vector [R], and `_group_R` holds the global number of
        # each unit's group. A reduction is then one `cat` and one `index_add_`, and a broadcast one
        # gather and one `split`, however many groups there are. `_padded_M` is the index of each
        # group in the flattened [L, N] matrix of `pad_by_family`.
        starts = [0, *accumulate(self.sizes[:-1])]
        owned = [
            (part, start)
            for family, start in zip(self.families, starts, strict=True)
            for part in family.owned_slices
        ]
        self._parts = [self._bind(part) for part, _ in owned]
        self._counts = [len(part.units) for part, _ in owned]
        self._group_R = torch.cat([part.groups + start for part, start in owned]).to(self.device)
        width = max(self.sizes)
        indices = [torch.arange(size) + row * width for row, size in enumerate(self.sizes)]
        self._padded_M = torch.cat(indices).to(self.device)

    def _bind(self, owned: Slice) -> _BoundSlice:
        """Precompute the values of a slice that depend on the shape of its parameter only."""
        shape = self.parameters[owned.tensor].shape
        count = unit_count(shape, owned.axes)
        # Most slices list all units in order, and need no gather or scatter by unit.
        complete = torch.equal(owned.units, torch.arange(count))
        units = None if complete else owned.units.to(self.device)
        outline = [size if axis in owned.axes else 1 for axis, size in enumerate(shape)]
        return _BoundSlice(owned.tensor, inner_axes(shape, owned.axes), outline, count, units)

    def _per_slice(self, values_M: Tensor, fill: float) -> Iterator[tuple[str, Tensor]]:
        """Yield each slice's values in a shape that broadcasts over its parameter.

        Units of the parameter that the slice does not list get `fill`.
        """
        # One cast for all slices: parameters of one network share a dtype.
        dtype = self.parameters[self._parts[0].tensor].dtype
        values = values_M.to(dtype)[self._group_R].split(self._counts)
        for part, value_R in zip(self._parts, values, strict=True):
            value_U = value_R
            if part.units is not None:
                value_U = value_R.new_full((part.count,), fill)
                value_U.index_copy_(0, part.units, value_R)
            yield part.tensor, value_U if len(part.outline) == 1 else value_U.view(part.outline)

    def _gather(self, parts: list[Tensor], square: bool = False) -> Tensor:
        """Sum values per unit (one tensor per slice), or their squares, into values per group."""
        listed = [
            value if part.units is None else value[part.units]
            for value, part in zip(parts, self._parts, strict=True)
        ]
        # fp64 before squaring: the budget equation compares all groups, and fp32 sums over slices
        # would be too coarse for small ones.
        value_R = torch.cat(listed).double()
        if square:
            value_R.square_()
        total_M = torch.zeros(self.groups, dtype=torch.float64, device=self.device)
        return total_M.index_add_(0, self._group_R, value_R)


def ownership_counts(
    parameters: dict[str, nn.Parameter], families: Sequence[GroupFamily]
) -> dict[str, Tensor]:
    """Return the number of groups that own each element, for each parameter with groups."""
    counts: dict[str, Tensor] = {}
    for family in families:
        for owned in family.owned_slices:
            shape = parameters[owned.tensor].shape
            unit_U = torch.zeros(unit_count(shape, owned.axes), dtype=torch.int32)
            unit_U.index_add_(0, owned.units, torch.ones_like(owned.units, dtype=torch.int32))
            zeros = torch.zeros(shape, dtype=torch.int32)
            count = counts.setdefault(owned.tensor, zeros)
            count += reshape_units(unit_U, shape, owned.axes)
    return counts


def refuse_overlap(parameters: dict[str, nn.Parameter], families: Sequence[GroupFamily]) -> None:
    """Raise if an element belongs to two groups; the envelope is defined on partitions."""
    for tensor, count in ownership_counts(parameters, families).items():
        if int(count.max()) > 1:
            owners = [f.name for f in families if any(s.tensor == tensor for s in f.owned_slices)]
            raise UserError(
                f"groups overlap in {tensor}: {' and '.join(dict.fromkeys(owners))} own the same "
                "weights; choose one kind of group per layer"
            )


GroupKind = Literal[
    "filters",
    "channels",
    "filter_shapes",
    "weights",
    "depth",
    "rows",
    "columns",
    "blocks",
    "masks",
    "neurons",
    "heads",
    "experts",
    "micro_experts",
]


@dataclass(frozen=True, eq=False)
class Slice:
    """Units of one tensor and the groups to which they belong.

    A unit is everything at one index of the tensor's `axes`, which are in ascending order; units
    are numbered as if these axes were flattened. In the weight of a convolution, axes (0,) make a
    filter a unit, (1,) an input channel, (1, 2, 3) a filter shape, all axes a single weight, and no
    axes the whole tensor. Unit `units[r]` belongs to group `groups[r]`; both are [R] int64.
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
class GroupFamily:
    """M groups of one kind and layer.

    `owned_slices` are measured and shrunk; `reader_slices` are only cut when groups are removed.
    `unremovable_reason` is None if the groups can be removed from the network. `form` describes how
    the layers of coupled filters depend on each other: families of equal form are isomorphic.
    `shortcuts` are what replaces each group that is a residual block.
    """

    name: str
    kind: GroupKind
    groups: int
    owned_slices: tuple[Slice, ...]
    reader_slices: tuple[Slice, ...] = ()
    unremovable_reason: str | None = None
    form: str = ""
    shortcuts: tuple[Shortcut, ...] = ()


def unit_count(shape: torch.Size, axes: tuple[int, ...]) -> int:
    """Return the number of units of a tensor of this shape."""
    count = 1
    for axis in axes:
        count *= shape[axis]
    return count


def inner_axes(shape: torch.Size, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes that lie inside a unit."""
    return tuple(axis for axis in range(len(shape)) if axis not in axes)


def reshape_units(unit_U: Tensor, shape: torch.Size, axes: tuple[int, ...]) -> Tensor:
    """Return one value per unit in a shape that broadcasts over the tensor."""
    # Ascending `axes` make this reshape agree with the flattened numbering of units.
    return unit_U.reshape([size if axis in axes else 1 for axis, size in enumerate(shape)])
