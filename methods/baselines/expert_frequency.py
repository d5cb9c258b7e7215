"""Expert frequency: drop the experts that the fewest calibration tokens are routed to.

Shapes: E routed experts, S tokens of one expert, D d_model, F an expert's width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.models.anatomy import MoEBlock
from methods.baselines.scored_experts import ScoredExperts


class Frequency:
    """N_e: number of tokens that have expert e among their top k."""

    def __init__(self, block: MoEBlock) -> None:
        # On the CPU: counts are Python integers, and no device transfer is needed per chunk.
        self._tokens_E = torch.zeros(block.num_experts, dtype=torch.float64)

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Count the tokens of one expert."""
        self._tokens_E[expert] += len(weight_S)

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """Ignore the shared experts: every token reaches them."""

    def output(self, y_TD: Tensor) -> None:
        """Ignore the block output."""

    def scores(self) -> Tensor:
        """Return N, float64 [E]."""
        return self._tokens_E


class ExpertFrequency(ScoredExperts):
    """Remove the experts that are used least often."""

    def observer(self, block: MoEBlock) -> Frequency:
        """Return a fresh observer of a block."""
        return Frequency(block)
