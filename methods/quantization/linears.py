"""Linear layers outside the routed experts, and Hessians of their inputs.

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
    """A linear layer, its role, and its name relative to `owner`."""

    kind: Kind
    owner: nn.Module
    name: str
    linear: nn.Linear

    def put(self, other: nn.Module) -> None:
        """Replace the layer."""
        self.owner.set_submodule(self.name, other)


def linears(layer: nn.Module, blocks: Sequence[MoEBlock]) -> list[Place]:
    """Return the linear layers of a decoder layer except routers and routed experts.

    The role of a gated feed-forward layer is `dense`, or `shared` in a MoE block; all others are
    `attention`.
    """
    shared = {m for b in blocks if b.shared is not None for m in b.shared.modules()}
    # Everything in a MoE block but the shared experts: routed experts have their own plans, and
    # routers and the gate of the shared experts are small, sensitive, and never quantized.
    routing = {m for b in blocks for m in b.block.modules()} - shared
    # Recognised by structure and not by name, so this holds for all architectures.
    gated = {part for module in layer.modules() for part in projections(module) or ()}
    found = []
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and module not in routing:
            dense: Kind = "dense" if module in gated else "attention"
            found.append(Place("shared" if module in shared else dense, layer, name, module))
    return found


@contextmanager
def watching(seen: Mapping[nn.Linear, Hessian]) -> Iterator[None]:
    """Add the inputs of the layers to their Hessians inside the `with` block."""
    with ExitStack() as stack:
        for linear, hessian in seen.items():
            stack.callback(linear.register_forward_pre_hook(_adding(hessian)).remove)
        yield


def _adding(hessian: Hessian) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        hessian.add(args[0].flatten(0, -2))

    return before
