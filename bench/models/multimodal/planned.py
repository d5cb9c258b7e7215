"""Protocol by which a network reports the FLOPs of its decoder for visual tokens.

A method that reduces the decoder's work stores a `FlopsProvider` on the network, next to the
forward that it replaced. It is asked at measurement time, so it reflects all later changes; a
method's report describes the state when that method had run, and another method may have followed.
And it is copied with the network, unlike a report or a field next to the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from bench.models.products import Product

# A plain attribute of the module, so that `copy.deepcopy` copies it with the network.
ATTRIBUTE = "slimbench_plan"
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class VisualLayer:
    """One layer as papers count it: number of visual tokens, shares of heads and neurons they use.

    `windowed` says that visual tokens attend to neighbours only.
    """

    tokens: int
    heads: float = 1.0
    neurons: float = 1.0
    windowed: bool = False


@runtime_checkable
class Planned(Protocol):
    """A decoder's account of its own work; inputs are a prompt's, as returned by the processor."""

    @property
    def untold(self) -> tuple[str, ...]:
        """Name the methods whose own matmuls are not in the account."""

    def prefill(self, inputs: Inputs) -> list[Product] | None:
        """Return the decoder's matmuls for a prompt, or None if they are those of the dense model.

        The head is not part of the decoder, nor are vision tower and projector, except for what a
        method makes them compute once more.
        """

    def token(self, inputs: Inputs) -> list[Product] | None:
        """Like `prefill`, for the first token that is generated after the prompt."""

    def layers(self, inputs: Inputs) -> list[VisualLayer]:
        """Return every layer of the decoder as papers count it."""


def plan_of(network: nn.Module) -> Planned | None:
    """Return the FLOPs provider that a method stored on a network, if any."""
    found = getattr(network, ATTRIBUTE, None)
    return found if isinstance(found, Planned) else None
