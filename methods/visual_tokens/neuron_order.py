"""Current order of a feed-forward's neurons, also after other methods removed some.

Shapes: F neurons of the loaded network, N neurons that are left, P remembered values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.errors import UserError
from bench.models.anatomy import ExpertView

# Leading values of a gate row that identify a neuron: enough for trained weights even in half
# precision, and little memory for all experts of a network.
REMEMBERED = 8


class NeuronOrder:
    """The order of one feed-forward's neurons, by their numbers in the loaded network.

    After neurons have been removed, the remaining ones are identified by their gate rows, which
    removal does not change.
    """

    def __init__(self, unit: ExpertView) -> None:
        self.width = unit.width
        self._rows_FP = unit.gate.detach()[:, :REMEMBERED].cpu().clone()
        self._order_N = torch.arange(self.width)

    def now(self, width: int) -> Tensor:
        """Return the numbers of the neurons in their present order, [N]."""
        assert len(self._order_N) == width
        return self._order_N

    def moved(self, places_N: Tensor) -> None:
        """Record a rearrangement; `places` are the old positions in their new order."""
        self._order_N = self._order_N[places_N]

    def follow(self, unit: ExpertView) -> Tensor:
        """Return the numbers of a feed-forward's neurons as it is now, [N].

        Raises:
            UserError: a neuron is not one of those that were loaded.
        """
        # Only a change of width is looked at: comparing rows at every call would copy weights to
        # the CPU. A method that permutes neurons without removing any is therefore not noticed.
        if unit.width != len(self._order_N):
            self._order_N = self._known_again(unit)
        return self._order_N

    def _known_again(self, unit: ExpertView) -> Tensor:
        """Find each neuron's number by the beginning of its gate row."""
        # Bit-exact values as dictionary keys: removal copies rows, so equal neurons have equal
        # bits. Duplicate rows (all-zero gates, say) share the last one's number, which is harmless
        # only if they compute the same.
        numbers = {tuple(row): number for number, row in enumerate(self._rows_FP.tolist())}
        rows_NP = unit.gate.detach()[:, :REMEMBERED].cpu().tolist()
        found = [numbers.get(tuple(row)) for row in rows_NP]
        if None in found:
            raise UserError(
                "a method changed a feed-forward of which visual tokens use a part, in a way that "
                "cannot be followed: list that method before the visual token strategies"
            )
        return torch.tensor(found, dtype=torch.int64)
