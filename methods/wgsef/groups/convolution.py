"""Groups of convolutional networks: filters, channels, filter shapes, single weights.

The kinds are those of arXiv 2212.12921 (abstract). Coupled filters come from torch-pruning's
dependency graph.

A filter can be removed only together with everything that depends on it: its BatchNorm scale and
shift, the depthwise filter that it feeds, and the filters added to it over a residual branch. These
form one group, which is zero-invariant (Chen et al., Only Train Once, 2021): if all of its weights
are zero, its output is exactly zero (WGSEF specification section 2).
"""

from __future__ import annotations

import copy
import importlib
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import UserError, error_sentence
from methods.wgsef.groups.partition import GroupFamily, GroupKind, Slice


def filters(network: nn.Module, example: Tensor) -> list[GroupFamily]:
    """Return filters and hidden neurons, each with everything coupled to it."""
    return coupled_filters(network, example)


def channels(network: nn.Module, example: Tensor) -> list[GroupFamily]:
    """Return input channels: for each hidden feature map, the slices of all layers that read it.

    This mirrors `filters`: a group owns the slices of the readers, and once these are zero, the
    filter that produces the feature map is removed with them.
    """
    mirrored = []
    for family in coupled_filters(network, example):
        # The remaining readers are running statistics of the producer's BatchNorm: buffers that
        # cannot be measured or shrunk and only follow on removal.
        reads = tuple(s for s in family.reader_slices if s.tensor.endswith(".weight"))
        rest = tuple(s for s in family.reader_slices if not s.tensor.endswith(".weight"))
        name = f"readers of {family.name}"
        mirrored.append(
            GroupFamily(name, "channels", family.groups, reads, (*family.owned_slices, *rest))
        )
    return mirrored


def filter_shapes(network: nn.Module, example: Tensor) -> list[GroupFamily]:
    """Return filter shapes: one position (channel, row, column) of all filters of a layer."""
    reason = "a filter shape is only zeroed, since a dense kernel cannot skip it"
    return [
        _uncoupled_family(name, module, (1, 2, 3), reason)
        for name, module in network.named_modules()
        # In a depthwise convolution a filter has one channel, so a filter shape would be a slice
        # through unrelated channels.
        if isinstance(module, nn.Conv2d) and module.groups == 1
    ]


def weights(network: nn.Module, example: Tensor) -> list[GroupFamily]:
    """Return the single weights of all convolutions and dense layers except the last one."""
    reason = "a single weight is only zeroed, since a dense kernel cannot skip it"
    logits = last_layer(network, example)
    return [
        _uncoupled_family(name, module, tuple(range(module.weight.ndim)), reason)
        for name, module in network.named_modules()
        if isinstance(module, PRUNABLE_LAYERS) and module is not logits
    ]


def _uncoupled_family(
    name: str, module: nn.Module, axes: tuple[int, ...], reason: str
) -> GroupFamily:
    """Return a family in which every unit is a group, zeroed but not removable."""
    weight = module.get_parameter("weight")
    count = 1
    for axis in axes:
        count *= weight.shape[axis]
    kind: GroupKind = "weights" if len(axes) == weight.ndim else "filter_shapes"
    owned = Slice.whole(f"{name}.weight", axes, count)
    return GroupFamily(name, kind, count, (owned,), unremovable_reason=reason)


PRUNABLE_LAYERS = (nn.Conv2d, nn.Linear)
TRACING_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
)
"""What torch-pruning raises if it cannot follow a forward; it has no exception class of its own."""


def coupled_filters(network: nn.Module, example: Tensor) -> list[GroupFamily]:
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
        last = last_layer(traced, example)
        groups = _dependency_groups(traced, example, last)
    except _TracingGivenUp:
        raise UserError(
            f"{type(network).__name__} cannot be traced: torch-pruning cannot determine which of "
            "its layers depend on each other; choose groups=heads or groups=depth, which need no "
            "trace"
        ) from None
    except TRACING_ERRORS as error:
        raise UserError(
            f"{type(network).__name__} cannot be traced: torch-pruning, which determines which of "
            f"its layers depend on each other, fails ({error_sentence(error)}); choose other "
            "groups, such as groups=weights"
        ) from error
    families = [_family_of(group, names) for group in groups]
    return [family for family in families if family is not None]


class _TracingGivenUp(UserWarning):
    """The tracer has reached its maximum recursion depth."""


def torch_pruning() -> Any:
    """Import torch-pruning, without timm unless that is imported already.

    Only its counter of FLOPs uses timm, which imports W&B: together two seconds.
    """
    absent = "timm" not in sys.modules
    if absent:
        # None makes `import timm` raise ImportError, which torch-pruning expects; typeshed allows
        # modules only.
        sys.modules["timm"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("torch_pruning")
    finally:
        if absent:
            del sys.modules["timm"]


def _dependency_groups(network: nn.Module, example: Tensor, last: nn.Module) -> list[Any]:
    with warnings.catch_warnings():
        # The graph builder warns about parameters that it does not wrap. They are in no group.
        warnings.simplefilter("ignore")
        # After this warning it would continue for hours with sizes that it does not know.
        warnings.filterwarnings("error", message="Maximum recursive depth reached")
        try:
            graph = torch_pruning().DependencyGraph().build_dependency(network, example)
            return list(
                graph.get_all_groups(ignored_layers=[last], root_module_types=PRUNABLE_LAYERS)
            )
        except UserWarning as warning:
            raise _TracingGivenUp from warning


def last_layer(network: nn.Module, example: Tensor) -> nn.Module:
    """Return the convolution or dense layer that runs last, which computes the logits."""
    order: list[nn.Module] = []
    # Found by a forward, because layers need not be registered in the order of execution.
    run_with_hooks(network, example, lambda layer, _: order.append(layer))
    return order[-1]


def run_with_hooks(
    network: nn.Module, example: Tensor, hook: Callable[[nn.Module, Tensor], None]
) -> None:
    """Run a network on one example and pass each prunable layer with its output to `hook`.

    Hooks and mode of the network are restored, even if the forward raises.
    """
    layers = [module for module in network.modules() if isinstance(module, PRUNABLE_LAYERS)]
    training = network.training
    with ExitStack() as stack:
        stack.callback(network.train, training)
        for layer in layers:
            handle = layer.register_forward_hook(lambda layer, _, output: hook(layer, output))
            stack.callback(handle.remove)
        # In training mode BatchNorm would update its running statistics from a single example.
        network.eval()
        with torch.no_grad():
            network(example)


def _family_of(group: Any, names: dict[nn.Module, str]) -> GroupFamily | None:
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
        # The name of torch-pruning's pruning function tells which side of the layer is cut. A
        # depthwise convolution counts as outgoing: it has one filter per channel, which is removed
        # with the filter that produces the channel.
        outgoing = "out_channels" in item.dep.handler.__name__
        if isinstance(module, PRUNABLE_LAYERS) and not outgoing:
            readers.append(Slice(f"{names[module]}.weight", (1,), units, groups))
            continue
        owned += _output_slices(names[module], module, units, groups)
        if isinstance(module, PRUNABLE_LAYERS):
            producers.append(names[module])
        elif isinstance(module, nn.BatchNorm2d):
            # Running statistics must shrink with the layer, but as buffers they cannot be owned.
            statistics = (f"{names[module]}.{name}" for name in ("running_mean", "running_var"))
            readers += [Slice(name, (0,), units, groups) for name in statistics]
    if not readers or not producers:
        return None
    # Root indices number the groups from 0 without gaps.
    count = 1 + max(int(owned_slice.groups.max()) for owned_slice in owned)
    form = _form_of(group)
    return GroupFamily(producers[0], "filters", count, tuple(owned), tuple(readers), form=form)


def _form_of(group: Any) -> str:
    """Return the types of the layers cut together and the side of each, in the order of the trace.

    Isomorphic Pruning (arXiv 2407.04616) compares groups of equal form, which torch-pruning tags in
    the same way.
    """
    parts = []
    for item in group:
        side = "out" if "out_channels" in item.dep.handler.__name__ else "in"
        ends = (type(end.module).__name__ for end in (item.dep.source, item.dep.target))
        parts.append(f"{'>'.join(ends)}:{side}")
    return " ".join(parts)


def _output_slices(name: str, module: nn.Module, units: Tensor, groups: Tensor) -> list[Slice]:
    parameters = dict(module.named_parameters(recurse=False))
    return [Slice(f"{name}.{key}", (0,), units, groups) for key in parameters]
