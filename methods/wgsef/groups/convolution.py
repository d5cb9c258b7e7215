"""Groups of convolutional networks: filters, channels, filter shapes, layer depths, single weights.

The kinds are those of arXiv 2212.12921 (abstract).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.errors import UserError
from methods.wgsef.groups.dependency import PRODUCERS, coupled_filters
from methods.wgsef.groups.family import Family, Kind, Slice


def filters(network: nn.Module, example: Tensor) -> list[Family]:
    """Return filters and hidden neurons, each with everything coupled to it."""
    return coupled_filters(network, example)


def channels(network: nn.Module, example: Tensor) -> list[Family]:
    """Return input channels: for each hidden feature map, the slices of all layers that read it.

    The mirror image of `filters`: the group owns the readers' slices, and the filter that produces
    the feature map is removed with them once they are zero.
    """
    mirrored = []
    for family in coupled_filters(network, example):
        # The remaining readers are running statistics of the producer's BatchNorm: buffers that
        # cannot be measured or shrunk and only follow on removal.
        reads = tuple(s for s in family.readers if s.tensor.endswith(".weight"))
        rest = tuple(s for s in family.readers if not s.tensor.endswith(".weight"))
        name = f"readers of {family.name}"
        mirrored.append(Family(name, "channels", family.groups, reads, (*family.owned, *rest)))
    return mirrored


def filter_shapes(network: nn.Module, example: Tensor) -> list[Family]:
    """Return filter shapes: one position (channel, row, column) of all filters of a layer."""
    reason = "a filter shape is only zeroed, since a dense kernel cannot skip it"
    return [
        _elementwise(name, module, (1, 2, 3), reason)
        for name, module in network.named_modules()
        # In a depthwise convolution a filter has one channel, so a filter shape would be a slice
        # through unrelated channels.
        if isinstance(module, nn.Conv2d) and module.groups == 1
    ]


def weights(network: nn.Module, example: Tensor) -> list[Family]:
    """Return the single weights of all convolutions and dense layers except the last one."""
    reason = "a single weight is only zeroed, since a dense kernel cannot skip it"
    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, PRODUCERS)]
    return [
        _elementwise(name, module, tuple(range(module.weight.ndim)), reason)
        # The last layer gives the logits. Order of registration stands in for order of execution
        # here, which holds for the classifiers of this package.
        for name, module in layers[:-1]
    ]


def depth(network: nn.Module, example: Tensor) -> list[Family]:
    """Return the residual branches of the network as the groups of one family.

    A branch is a module named `branch` of a block that adds it to a shortcut. With all of its
    weights zero, its last BatchNorm included, it adds nothing, so the group can be removed.

    Raises:
        UserError: the network has no residual branches.
    """
    branches = [n for n, _ in network.named_modules() if n.split(".")[-1] == "branch"]
    if not branches:
        raise UserError(f"{type(network).__name__} has no residual branches to remove")
    # Axes () make a whole tensor one unit, with number 0.
    first = torch.zeros(1, dtype=torch.long)
    owned = [
        Slice(f"{name}.{key}", (), first, torch.tensor([group]))
        for group, name in enumerate(branches)
        for key, _ in network.get_submodule(name).named_parameters()
    ]
    return [Family("residual branches", "depth", len(branches), tuple(owned))]


def _elementwise(name: str, module: nn.Module, axes: tuple[int, ...], reason: str) -> Family:
    """Return a family in which every unit is a group, zeroed but not removable."""
    weight = module.get_parameter("weight")
    count = 1
    for axis in axes:
        count *= weight.shape[axis]
    kind: Kind = "weights" if len(axes) == weight.ndim else "filter_shapes"
    owned = Slice.whole(f"{name}.weight", axes, count)
    return Family(name, kind, count, (owned,), removable=reason)
