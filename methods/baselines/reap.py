"""REAP (arXiv 2510.13999): drop the experts that contribute least to the tokens routed to them.

Shapes: E routed experts, S tokens of one expert, D d_model, F an expert's width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.models.anatomy import MoEBlock
from methods.baselines.scored_experts import ScoredExperts
from methods.baselines.whole_experts import Form
from methods.micro_experts import view


class Saliency:
    """S_e = mean over the tokens t routed to e of A_te · ‖f_e(x_t)‖₂ (router-weighted norm).

    A is the weight that the model's router applies, f_e the unweighted expert. An expert that no
    token reached has S_e = 0.
    """

    def __init__(self, block: MoEBlock) -> None:
        device = view(block, 0).down.device
        self._block = block
        self._sum_E = torch.zeros(block.num_experts, dtype=torch.float64, device=device)
        self._tokens_E = torch.zeros(block.num_experts, dtype=torch.float64, device=device)

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one expert."""
        output_SD = self._block.expert(expert).combine(hidden_SF)
        # The norm accumulates D squares, which overflows or loses digits in half precision.
        norm_S = torch.linalg.vector_norm(output_SD, dim=1, dtype=torch.float32)
        self._sum_E[expert] += (norm_S * weight_S.float()).sum(dtype=torch.float64)
        self._tokens_E[expert] += len(weight_S)

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """Ignore the shared experts: they are not scored."""

    def output(self, y_TD: Tensor) -> None:
        """Ignore the block output."""

    def scores(self) -> Tensor:
        """Return S, float64 [E]."""
        # The mean is over routed tokens only, not over all tokens: frequency is deliberately not a
        # part of REAP's score.
        return self._sum_E / self._tokens_E.clamp_min(1)


class Reap(ScoredExperts):
    """Remove the experts of lowest saliency, measured on the unpruned model.

    As published, the router no longer selects them (`form=dropped`), and all layers are measured
    before any is changed (`sequential=false`).
    """

    form: Form = "dropped"
    sequential: bool = False

    def observer(self, block: MoEBlock) -> Saliency:
        """Return a fresh observer of a block."""
        return Saliency(block)
