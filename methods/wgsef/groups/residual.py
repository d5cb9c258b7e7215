"""Residual blocks as groups: any module that adds a branch to a shortcut, found by trying.

With all weights of its branch zero, such a module returns its input, or what one of its children
makes of it, perhaps through a ReLU. That is what it is replaced by once its group is zero, and
nothing else is called a block: where the shapes of input and output differ, a child has to lead
from one to the other.
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

    `example` is one input of the network, [1, channels, height, width]. A group owns the weights
    of a block except those of its shortcut. Of nested blocks, such as a stage and what it is made
    of, only the innermost count.

    Raises:
        UserError: the network has no such block.
    """
    shortcuts = [s for s in _shortcuts(network, example) if fnmatchcase(s.block, layers)]
    if not shortcuts:
        where = "" if layers == "*" else f" in layers.depth={layers}"
        raise UserError(
            f"{type(network).__name__} has no residual branches to remove{where}: no module "
            "returns its input, or what one child makes of it, when its other weights are zero"
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
    calls, unlike = _calls(trial, image)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Shortcut] = {}
    # Children come before the modules that hold them.
    for name, module in reversed(list(trial.named_modules())):
        if name not in calls or any(inner.startswith(f"{name}.") for inner in found):
            continue
        # Inside of it may be blocks that could not be tried.
        if any(inner.startswith(f"{name}.") for inner in unlike):
            continue
        call = calls[name]
        # Of both signs, whatever the network sends: a ReLU would else pass for an identity.
        x = torch.randn(call.shape, generator=generator, dtype=torch.float64)
        shortcut = _shortcut_of(name, module, x, call.keywords)
        if shortcut is not None:
            found[name] = shortcut
    return list(found.values())[::-1]


@dataclass(frozen=True)
class _Call:
    """Shape of a module's one input, and what it is given by name."""

    shape: torch.Size
    keywords: dict[str, object]


@torch.no_grad()
def _calls(network: nn.Module, image: Tensor) -> tuple[dict[str, _Call], set[str]]:
    """Return how modules with children are called with one tensor, and which are called otherwise.

    Attention is no block and holds none.
    """
    calls: dict[str, _Call] = {}
    unlike: set[str] = set()
    handles = []
    for name, module in network.named_modules():
        if not name or not any(True for _ in module.children()):
            continue

        def note(
            module: nn.Module,
            args: tuple[object, ...],
            given: dict[str, object],
            name: str = name,
        ) -> None:
            if len(args) == 1 and isinstance(args[0], Tensor):
                calls[name] = _Call(args[0].shape, dict(given))
            elif not isinstance(module, ATTENTION):
                unlike.add(name)

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        network(image)
    finally:
        for handle in handles:
            handle.remove()
    return calls, unlike


@torch.no_grad()
def _shortcut_of(
    name: str, block: nn.Module, x: Tensor, keywords: dict[str, object]
) -> Shortcut | None:
    """Return what a module does when all but a shortcut is zero, None if that is no shortcut."""
    sizes = {child: _weights(part) for child, part in block.named_children()}
    # A branch that is one child could pass for the shortcut of its shortcut: the lighter one is it.
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
    """Return the names of a block's parameters outside of its shortcut."""
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
