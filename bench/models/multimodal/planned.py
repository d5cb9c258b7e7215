"""What a network is planned to compute for visual tokens, read off the network itself.

A method that makes a decoder do less leaves a `Planned` on the network, beside the forward that it
replaced. It is asked when something is measured, so it knows of all that was changed since; a
method's report tells what was so when the method had run, and another may have come after it. And
it is copied with the network, which a report or a field beside the network is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from bench.models.products import Product

ATTRIBUTE = "slimbench_plan"
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class VisualLayer:
    """One layer as papers count it: visual tokens in it, shares of heads and neurons they use.

    `windowed` says that visual tokens see only neighbours.
    """

    tokens: int
    heads: float = 1.0
    neurons: float = 1.0
    windowed: bool = False


@runtime_checkable
class Planned(Protocol):
    """A decoder's own account of its work; inputs are a prompt's, as the processor made them."""

    @property
    def untold(self) -> tuple[str, ...]:
        """Name the choices whose own products are not in the account."""

    def prefill(self, inputs: Inputs) -> list[Product] | None:
        """Return the decoder's products for a prompt, None if they are those of the stock network.

        The head is not the decoder's, nor are vision tower and projector, but for what a method
        has them do once more.
        """

    def token(self, inputs: Inputs) -> list[Product] | None:
        """Return the same for the first token that is generated after the prompt."""

    def layers(self, inputs: Inputs) -> list[VisualLayer]:
        """Return every layer of the decoder as papers count it."""


def plan_of(network: nn.Module) -> Planned | None:
    """Return the plan that a method left on a network, if any."""
    found = getattr(network, ATTRIBUTE, None)
    return found if isinstance(found, Planned) else None
