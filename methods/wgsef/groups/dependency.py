"""Coupled groups of a convolutional or dense network, from torch-pruning's dependency graph.

A filter can be taken out only together with what follows it: its BatchNorm scale and shift, the
depthwise filter that it feeds, the filters that are added to it over a residual branch. They form
one group, which is zero-invariant (Chen et al., Only Train Once, 2021): with all of its weights
zero its output is exactly zero, whatever the readers do (WGSEF specification section 2).
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import UserError
from methods.wgsef.groups.family import Family, Slice

PRODUCERS = (nn.Conv2d, nn.Linear)


def coupled_filters(network: nn.Module, example: Tensor) -> list[Family]:
    """Return one family per set of coupled layers, its groups being filters or dense neurons.

    `example` is one input of the network, [1, channels, height, width]. The layer that gives the
    network's answer keeps its outputs.

    Raises:
        UserError: the network cannot be traced.
    """
    # The tracer leaves hooks and gradients behind, so it gets a network of its own.
    traced = copy.deepcopy(network).eval().requires_grad_(True)
    names = {module: name for name, module in traced.named_modules()}
    try:
        graph = _graph(traced, example)
        last = last_layer(traced, example)
        groups = list(graph.get_all_groups(ignored_layers=[last], root_module_types=PRODUCERS))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{type(network).__name__} cannot be traced: {reason}") from error
    families = [_family(group, names) for group in groups]
    return [family for family in families if family is not None]


def _graph(network: nn.Module, example: Tensor) -> Any:
    import torch_pruning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_pruning.DependencyGraph().build_dependency(network, example)


def last_layer(network: nn.Module, example: Tensor) -> nn.Module:
    """Return the convolution or dense layer that runs last, which gives the network's answer."""
    order: list[nn.Module] = []

    def note(module: nn.Module, inputs: object, output: object) -> None:
        order.append(module)

    layers = [module for module in network.modules() if isinstance(module, PRODUCERS)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    with torch.no_grad():
        network(example)
    for handle in handles:
        handle.remove()
    return order[-1]


def _family(group: Any, names: dict[nn.Module, str]) -> Family | None:
    """Return one dependency group as a family; None if nothing reads it."""
    owned: list[Slice] = []
    readers: list[Slice] = []
    producers: list[str] = []
    for item in group:
        module = item.dep.target.module
        if module not in names:
            continue
        units, groups = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
        outgoing = "out_channels" in item.dep.handler.__name__
        if isinstance(module, PRODUCERS) and not outgoing:
            readers.append(Slice(f"{names[module]}.weight", (1,), units, groups))
            continue
        owned += _produced(names[module], module, units, groups)
        if isinstance(module, PRODUCERS):
            producers.append(names[module])
        elif isinstance(module, nn.BatchNorm2d):
            statistics = (f"{names[module]}.{name}" for name in ("running_mean", "running_var"))
            readers += [Slice(name, (0,), units, groups) for name in statistics]
    if not readers or not producers:
        return None
    count = 1 + max(int(owned_slice.groups.max()) for owned_slice in owned)
    return Family(producers[0], "filters", count, tuple(owned), tuple(readers))


def _produced(name: str, module: nn.Module, units: Tensor, groups: Tensor) -> list[Slice]:
    """Return the slices of one layer that belong to its output units."""
    parameters = dict(module.named_parameters(recurse=False))
    return [Slice(f"{name}.{key}", (0,), units, groups) for key in parameters]
