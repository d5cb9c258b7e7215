"""Residual blocks as groups: modules that add a branch to a shortcut, found by trial.

If all weights of its branch are zero, a residual block returns its input or the output of one of
its children for that input, possibly through a ReLU. This shortcut replaces the block once its
group is zero. Only modules that behave like this count as residual blocks; if the shapes of input
and output differ, the shortcut must be a child.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bench.errors import UserError
from bench.models.classifiers.pruned_modules import ATTENTION, Shortcut
from methods.wgsef.groups.partition import GroupFamily, Slice
from methods.wgsef.groups.verification import FORWARD_ERRORS, TOLERANCE, with_random_weights


def depth(network: nn.Module, example: Tensor, layers: str = "*") -> list[GroupFamily]:
    """Return the residual blocks whose names match a pattern as the groups of one family.

    `example` is one input of the network, [1, channels, height, width]. A group owns the weights of
    a block except those of its shortcut. If blocks are nested, such as a stage and its blocks, only
    the innermost ones count.

    Raises:
        UserError: the network has no such block.
    """
    shortcuts = [s for s in _shortcuts(network, example) if fnmatchcase(s.block, layers)]
    if not shortcuts:
        where = "" if layers == "*" else f" in layers.depth={layers}"
        raise UserError(
            f"{type(network).__name__} has no residual branches to remove{where}: no module "
            "returns its input, or one child's output for it, when its other weights are zero; "
            "choose another kind of groups"
        )
    # Axes () make a whole tensor one unit, with number 0.
    first = torch.zeros(1, dtype=torch.long)
    owned = [
        Slice(f"{shortcut.block}.{key}", (), first, torch.tensor([group]))
        for group, shortcut in enumerate(shortcuts)
        for key in _branch_weights(network.get_submodule(shortcut.block), shortcut.child)
    ]
    return [
        GroupFamily(
            "residual branches", "depth", len(shortcuts), tuple(owned), shortcuts=tuple(shortcuts)
        )
    ]


def _shortcuts(network: nn.Module, example: Tensor) -> list[Shortcut]:
    """Return the shortcut of every innermost residual block, in the order of the network."""
    trial, image = with_random_weights(network, example)
    calls, untestable = _record_calls(trial, image)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Shortcut] = {}
    # Reversed, so that children come before their parents.
    for name, module in reversed(list(trial.named_modules())):
        if name not in calls or any(inner.startswith(f"{name}.") for inner in found):
            continue
        # A module that could not be tested may be or contain an inner block.
        if any(inner.startswith(f"{name}.") for inner in untestable):
            continue
        call = calls[name]
        # Random inputs have both signs. With the network's own inputs, which may all be positive, a
        # ReLU would look like an identity.
        x = torch.randn(call.shape, generator=generator, dtype=torch.float64)
        shortcut = _shortcut_of(name, module, x, call.keywords)
        if shortcut is not None:
            found[name] = shortcut
    return list(found.values())[::-1]


@dataclass(frozen=True)
class _Call:
    """Shape of a module's only positional input, and its keyword arguments."""

    shape: torch.Size
    keywords: dict[str, object]


@torch.no_grad()
def _record_calls(network: nn.Module, image: Tensor) -> tuple[dict[str, _Call], set[str]]:
    """Return the calls of modules with children, and the names of modules that cannot be tested.

    Modules can be tested if their only positional argument is a tensor. Attention is not listed
    among the others, because it neither is nor contains a residual block.
    """
    calls: dict[str, _Call] = {}
    untestable: set[str] = set()
    handles = []
    for name, module in network.named_modules():
        if not name or not any(True for _ in module.children()):
            continue

        def note(
            module: nn.Module,
            args: tuple[object, ...],
            kwargs: dict[str, object],
            name: str = name,
        ) -> None:
            if len(args) == 1 and isinstance(args[0], Tensor):
                calls[name] = _Call(args[0].shape, dict(kwargs))
            elif not isinstance(module, ATTENTION):
                untestable.add(name)

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        network(image)
    finally:
        for handle in handles:
            handle.remove()
    return calls, untestable


@torch.no_grad()
def _shortcut_of(
    name: str, block: nn.Module, x: Tensor, keywords: dict[str, object]
) -> Shortcut | None:
    """Return the shortcut of a module, or None if the module is no residual block."""
    sizes = {child: _weights(part) for child, part in block.named_children()}
    # If the branch is a single child, branch and shortcut are indistinguishable: the child with
    # fewer weights is taken as the shortcut.
    for child in ("", *sorted((c for c, size in sizes.items() if size), key=sizes.__getitem__)):
        weights = _branch_weights(block, child)
        if not weights:
            continue
        zeros = {key: torch.zeros_like(block.get_parameter(key)) for key in weights}
        try:
            output = functional_call(block, zeros, (x,), keywords)
            expected = block.get_submodule(child)(x) if child else x
        except FORWARD_ERRORS:
            continue
        for rectified in (False, True):
            kept = torch.relu(expected) if rectified else expected
            if _agree(output, kept):
                return Shortcut(block=name, child=child, rectified=rectified)
    return None


def _branch_weights(block: nn.Module, shortcut: str) -> list[str]:
    """Return the names of a block's parameters that are not in its shortcut."""
    names = (name for name, _ in block.named_parameters())
    return [name for name in names if not (shortcut and name.startswith(f"{shortcut}."))]


def _weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _agree(output: object, expected: object) -> bool:
    if (
        not (isinstance(output, Tensor) and isinstance(expected, Tensor))
        or output.shape != expected.shape
    ):
        return False
    return bool((output - expected).abs().max() <= TOLERANCE * expected.abs().max())
