"""Drop the experts that the fewest calibration tokens are routed to.

Shapes: E routed experts, S tokens of one expert, D d_model, F an expert's width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.models.anatomy import MoEBlock
from methods.baselines.scored_experts import ScoredExperts


class Frequency:
    """N_e: how many tokens have expert e among their top k."""

    def __init__(self, block: MoEBlock) -> None:
        self._tokens_E = torch.zeros(block.num_experts, dtype=torch.float64)

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Count the tokens of one expert."""
        self._tokens_E[expert] += len(weight_S)

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """Shared experts meet every token."""

    def output(self, y_TD: Tensor) -> None:
        """The block's output does not matter."""

    def scores(self) -> Tensor:
        """Return N, float64 [E]."""
        return self._tokens_E


class ExpertFrequency(ScoredExperts):
    """Remove whole experts by how rarely they are used."""

    def observer(self, block: MoEBlock) -> Frequency:
        """Return a fresh observer of a block."""
        return Frequency(block)
