"""From statistics to experts in the shared form: one base and each expert's factors.

Shapes: E routed experts, S tokens of one expert, T tokens, D d_model, F an expert's width, O
outputs and I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.models.anatomy import MoEBlock
from methods.baselines.d2_moe.experts import MATRICES, SharedBaseExperts, SharedMatrix
from methods.baselines.d2_moe.factors import factorise
from methods.baselines.d2_moe.merging import Matrices
from methods.walking import refuse_nan


class Inputs:
    """Observes Xᵀ X of what the routed experts of a block are given: [D, D] and [F, F] each."""

    def __init__(self, block: MoEBlock) -> None:
        down = block.expert(0).down
        sizes = (block.num_experts, block.d_model), (block.num_experts, block.d_ff)
        self.of_block_EDD, self.of_down_EFF = (
            torch.zeros(count, size, size, dtype=torch.float64, device=down.device)
            for count, size in sizes
        )

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one expert; the router's weight comes after them."""
        self.of_block_EDD[expert] += x_SD.float().mT @ x_SD.float()
        self.of_down_EFF[expert] += hidden_SF.float().mT @ hidden_SF.float()

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """Shared experts stay as they are."""

    def output(self, y_TD: Tensor) -> None:
        """The block's output does not matter."""


def assemble(
    block: MoEBlock, base: Matrices, inputs: Inputs, ranks: Sequence[int], damping: float
) -> SharedBaseExperts:
    """Return experts in the shared form, in the model's dtype.

    `ranks` names each expert's gate, up and down rank, in this order.

    Raises:
        UserError: an activation was NaN or infinite.
    """
    refuse_nan(block, inputs.of_block_EDD, inputs.of_down_EFF)
    grams = (inputs.of_block_EDD, inputs.of_block_EDD, inputs.of_down_EFF)
    matrices = {
        name: _matrix(block, name, base_OI, gram_EII, ranks[place::3], damping)
        for place, (name, base_OI, gram_EII) in enumerate(zip(MATRICES, base, grams, strict=True))
    }
    return SharedBaseExperts(matrices, block.expert(0).act)


def _matrix(
    block: MoEBlock,
    name: str,
    base_OI: Tensor,
    gram_EII: Tensor,
    ranks: Sequence[int],
    damping: float,
) -> SharedMatrix:
    """Return one of the three matrices of all experts in its shared form."""
    weights = [getattr(block.expert(expert), name) for expert in range(block.num_experts)]
    # Differences are taken from the base as it is stored, so that its rounding is made good.
    base_OI = base_OI.to(weights[0].dtype)
    factors = [
        factorise(weight_OI.double() - base_OI.double(), gram_II, rank, damping)
        for weight_OI, gram_II, rank in zip(weights, gram_EII, ranks, strict=True)
    ]
    left_OR = torch.cat([left for left, _ in factors], dim=1).to(base_OI.dtype)
    right_RI = torch.cat([right for _, right in factors]).to(base_OI.dtype)
    return SharedMatrix(base_OI, left_OR, right_RI, ranks)
