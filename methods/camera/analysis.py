"""Energies of all micro-experts, measured on calibration text.

Shapes: T tokens, S tokens of one expert, D d_model, F an expert's width, N micro-experts of a
layer, E routed experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.models.structure.moe_block import MoEBlock
from methods.camera.energy import energy
from methods.moe.calibration_statistics import Moments, squared_column_norms
from methods.moe.calibration_walk import require_finite
from methods.moe.least_squares import ExpertGrams
from methods.moe.micro_experts import SHARED, expert_spans, expert_view


class BlockEnergies:
    """Observer of one block that accumulates the statistics for its micro-experts' energies.

    `tokens` counts all tokens, `tokens_per_expert` [E] those of each routed expert; `output_power`
    is Σ_t ‖y_t‖² of the block output. `grams`, if given, accumulates the statistics of a refit.
    """

    def __init__(self, block: MoEBlock, grams: ExpertGrams | None = None) -> None:
        device = expert_view(block, 0).down.device
        self.block = block
        # A second observer instead of a second pass: the walk is the expensive part.
        self.grams = grams
        self.tokens = 0
        self.tokens_per_expert = [0] * block.num_experts
        self.output_power = 0.0
        self._places = dict(expert_spans(block))
        self._moments = Moments(block.micro_experts, device)

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one routed expert."""
        self.tokens_per_expert[expert] += len(x_SD)
        self._moments.add(self._places[expert], hidden_SF, weight_S)
        if self.grams is not None:
            self.grams.routed(expert, x_SD, hidden_SF, weight_S)

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """Add all tokens of the shared experts."""
        self._moments.add(self._places[SHARED], hidden_TF, weight_T)
        if self.grams is not None:
            self.grams.shared(x_TD, hidden_TF, weight_T)

    def output(self, y_TD: Tensor) -> None:
        """Add the power of the block output."""
        self.tokens += len(y_TD)
        self.output_power += float(y_TD.float().square().sum(dtype=torch.float64))

    def energies(self, alpha: float, *, normalised: bool) -> Tensor:
        """Return the energies in flat order, float64 [N], using the current weights.

        Raises:
            UserError: an activation was NaN or infinite.
        """
        # `_places` is in flat order, so concatenated norms line up with the moments.
        norms = [
            squared_column_norms(expert_view(self.block, expert).down) for expert in self._places
        ]
        tokens = self.tokens if normalised else None
        energy_N = energy(self._moments, torch.cat(norms), alpha, tokens)
        require_finite(self.block, energy_N)
        return energy_N
