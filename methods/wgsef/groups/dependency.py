"""Coupled groups of a convolutional or dense network, from torch-pruning's dependency graph.

A filter can be removed only together with everything that depends on it: its BatchNorm scale and
shift, the depthwise filter that it feeds, the filters added to it over a residual branch. They form
one group, which is zero-invariant (Chen et al., Only Train Once, 2021): with all of its weights
zero its output is exactly zero, whatever its readers do (WGSEF specification section 2).
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
    """Return one family per set of coupled layers; its groups are filters or dense neurons.

    `example` is one input of the network, [1, channels, height, width]. The layer that computes the
    logits keeps all of its outputs.

    Raises:
        UserError: the network cannot be traced.
    """
    # The tracer leaves hooks and gradients behind, so it runs on a copy.
    traced = copy.deepcopy(network).eval().requires_grad_(True)
    names = {module: name for name, module in traced.named_modules()}
    try:
        graph = _graph(traced, example)
        last = last_layer(traced, example)
        groups = list(graph.get_all_groups(ignored_layers=[last], root_module_types=PRODUCERS))
    # torch-pruning has no exception class of its own for a forward that it cannot follow, so any of
    # these may mean that.
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{type(network).__name__} cannot be traced: {reason}") from error
    families = [_family(group, names) for group in groups]
    return [family for family in families if family is not None]


def _graph(network: nn.Module, example: Tensor) -> Any:
    import torch_pruning

    with warnings.catch_warnings():
        # The graph builder warns about parameters that it does not wrap; those are in no group and
        # stay.
        warnings.simplefilter("ignore")
        return torch_pruning.DependencyGraph().build_dependency(network, example)


def last_layer(network: nn.Module, example: Tensor) -> nn.Module:
    """Return the convolution or dense layer that runs last, which computes the logits."""
    order: list[nn.Module] = []

    def note(module: nn.Module, inputs: object, output: object) -> None:
        order.append(module)

    # Registration order need not be execution order, so the forward decides which layer is last.
    layers = [module for module in network.modules() if isinstance(module, PRODUCERS)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    with torch.no_grad():
        network(example)
    for handle in handles:
        handle.remove()
    return order[-1]


def _family(group: Any, names: dict[nn.Module, str]) -> Family | None:
    """Return a dependency group as a family, or None if no layer reads it."""
    owned: list[Slice] = []
    readers: list[Slice] = []
    producers: list[str] = []
    for item in group:
        module = item.dep.target.module
        # torch-pruning adds pseudo-modules (reshape, concatenation, elementwise) that hold no
        # weights.
        if module not in names:
            continue
        units, groups = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
        # The pruning function torch-pruning would call tells which side of the layer is cut. A
        # depthwise convolution counts as outgoing: its filters are one per channel and go with the
        # producer.
        outgoing = "out_channels" in item.dep.handler.__name__
        if isinstance(module, PRODUCERS) and not outgoing:
            readers.append(Slice(f"{names[module]}.weight", (1,), units, groups))
            continue
        owned += _produced(names[module], module, units, groups)
        if isinstance(module, PRODUCERS):
            producers.append(names[module])
        elif isinstance(module, nn.BatchNorm2d):
            # Running statistics are buffers: they must shrink with the layer but have no gradient
            # to prune by.
            statistics = (f"{names[module]}.{name}" for name in ("running_mean", "running_var"))
            readers += [Slice(name, (0,), units, groups) for name in statistics]
    if not readers or not producers:
        return None
    # Root indices number the groups from 0 without gaps.
    count = 1 + max(int(owned_slice.groups.max()) for owned_slice in owned)
    return Family(producers[0], "filters", count, tuple(owned), tuple(readers))


def _produced(name: str, module: nn.Module, units: Tensor, groups: Tensor) -> list[Slice]:
    parameters = dict(module.named_parameters(recurse=False))
    return [Slice(f"{name}.{key}", (0,), units, groups) for key in parameters]
