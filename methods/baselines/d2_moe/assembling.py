"""Assembly of shared-base experts from calibration statistics.

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
    """Observer of Xᵀ X of each routed expert: inputs [D, D] and hidden states [F, F]."""

    def __init__(self, block: MoEBlock) -> None:
        down = block.expert(0).down
        sizes = (block.num_experts, block.d_model), (block.num_experts, block.d_ff)
        self.of_block_EDD, self.of_down_EFF = (
            torch.zeros(count, size, size, dtype=torch.float64, device=down.device)
            for count, size in sizes
        )

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one expert, without router weights."""
        self.of_block_EDD[expert] += x_SD.float().mT @ x_SD.float()
        self.of_down_EFF[expert] += hidden_SF.float().mT @ hidden_SF.float()

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """Ignore the shared experts: they are not compressed."""

    def output(self, y_TD: Tensor) -> None:
        """Ignore the block output."""


def assemble(
    block: MoEBlock, base: Matrices, inputs: Inputs, ranks: Sequence[int], damping: float
) -> SharedBaseExperts:
    """Build the shared-base experts of a block, in the dtype of the model.

    `ranks` lists gate, up and down rank expert by expert.

    Raises:
        UserError: an activation was NaN or infinite.
    """
    refuse_nan(block, inputs.of_block_EDD, inputs.of_down_EFF)
    # Gate and up read the same inputs.
    grams = (inputs.of_block_EDD, inputs.of_block_EDD, inputs.of_down_EFF)
    matrices = {
        # ranks[place::3] picks one matrix out of (gate, up, down) per expert.
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
    weights = [getattr(block.expert(expert), name) for expert in range(block.num_experts)]
    # Relative to the base as stored, in half precision perhaps: the factors then also correct its
    # rounding error.
    base_OI = base_OI.to(weights[0].dtype)
    factors = [
        factorise(weight_OI.double() - base_OI.double(), gram_II, rank, damping)
        for weight_OI, gram_II, rank in zip(weights, gram_EII, ranks, strict=True)
    ]
    left_OR = torch.cat([left for left, _ in factors], dim=1).to(base_OI.dtype)
    right_RI = torch.cat([right for _, right in factors]).to(base_OI.dtype)
    return SharedMatrix(base_OI, left_OR, right_RI, ranks)
