"""Which neuron of the loaded network is where now, also after other methods removed some.

Shapes: F neurons of the loaded network, N neurons that are still there, P remembered values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.errors import UserError
from bench.models.anatomy import ExpertView

# So many values of a neuron's gate row tell it from all others.
REMEMBERED = 8


class NeuronOrder:
    """The order of one feed-forward's neurons, numbered as in the loaded network.

    When neurons were removed, those that are left are known again by their gate rows, which
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
        """Enter that neurons were rearranged; `places` are their old places."""
        self._order_N = self._order_N[places_N]

    def follow(self, unit: ExpertView) -> Tensor:
        """Return the numbers of a feed-forward's neurons as it is now, [N].

        Raises:
            UserError: its neurons are not some of those that it had.
        """
        if unit.width != len(self._order_N):
            self._order_N = self._known_again(unit)
        return self._order_N

    def _known_again(self, unit: ExpertView) -> Tensor:
        """Find each neuron's number by the beginning of its gate row."""
        numbers = {tuple(row): number for number, row in enumerate(self._rows_FP.tolist())}
        rows_NP = unit.gate.detach()[:, :REMEMBERED].cpu().tolist()
        found = [numbers.get(tuple(row)) for row in rows_NP]
        if None in found:
            raise UserError(
                "a method changed a feed-forward that visual tokens use only in part, in a way "
                "that cannot be followed: put that method before the visual token strategies"
            )
        return torch.tensor(found, dtype=torch.int64)
