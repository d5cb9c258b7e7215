"""The linear layers outside the routed experts: which there are, and what they see.

Shapes: S tokens, C input columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from bench.models.anatomy import MoEBlock
from bench.models.anatomy.expert import projections
from methods.quantization.hessian import Hessian

Kind = Literal["attention", "dense", "shared", "head"]


@dataclass(frozen=True)
class Place:
    """A linear layer: what it belongs to, and its name below `owner`."""

    kind: Kind
    owner: nn.Module
    name: str
    linear: nn.Linear

    def put(self, other: nn.Module) -> None:
        """Replace it."""
        self.owner.set_submodule(self.name, other)


def linears(layer: nn.Module, blocks: Sequence[MoEBlock]) -> list[Place]:
    """Return the linear layers of a decoder layer, those of routers and routed experts left out.

    A gated feed-forward part is `dense`, or `shared` in a MoE block; all others are `attention`.
    """
    shared = {m for b in blocks if b.shared is not None for m in b.shared.modules()}
    routing = {m for b in blocks for m in b.block.modules()} - shared
    gated = {part for module in layer.modules() for part in projections(module) or ()}
    found = []
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and module not in routing:
            dense: Kind = "dense" if module in gated else "attention"
            found.append(Place("shared" if module in shared else dense, layer, name, module))
    return found


@contextmanager
def watching(seen: Mapping[nn.Linear, Hessian]) -> Iterator[None]:
    """Add what the layers receive inside the `with` to their Hessians."""
    with ExitStack() as stack:
        for linear, hessian in seen.items():
            stack.callback(linear.register_forward_pre_hook(_adding(hessian)).remove)
        yield


def _adding(hessian: Hessian) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Return a hook that adds a layer's input to a Hessian."""

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        hessian.add(args[0].flatten(0, -2))

    return before
