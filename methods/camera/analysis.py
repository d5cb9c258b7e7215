"""CAMERA's analysis: the energy of every micro-expert, measured on calibration text.

Shapes: T tokens, S tokens of one expert, D d_model, F an expert's width, N micro-experts of a layer
(shared ones first), E routed experts.

With φ_ti the coefficient of micro-expert i on token t, router weight included, and w_i its down
column, the layer's routed output is y_t = Σ_i φ_ti w_i. Then (arXiv 2508.02322, section 3)

    E_i = [ (1 - α) · ‖φ_i‖₂² + α · ‖φ_i‖∞² ] · ‖w_i‖₂²

in units of squared activation times squared weight. At α = 0, E_i is exactly the squared error of
the layer's output, summed over tokens, that removing micro-expert i alone causes.

The paper's values of α, the weight of the peak term, are known only second-hand:

- `official`: the authors' code (xuyuzhuang11/CAMERA at 4f3ddd6) uses 1.0 by default, and its run.sh
  uses 0.90 for DeepSeek-MoE, the only model that it runs.
- `paper`: 0.95, from the README of the authors' Ascend port, and 1.0 for Qwen3.
- `low_peak`: a note gives 0.05, and 0 for Qwen3, which may also be meant as the peak's weight.

Which of them the paper used is open: run all three before claiming a replication.

For every model, the official code also divides the router weights of a token by their sum over the
chosen experts. Qwen3 and Mixtral do that themselves. DeepSeek-MoE does not, so for that model the
official φ is not the coefficient that the model applies.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from bench.models.structure.moe_block import MoEBlock
from methods.moe.calibration import Moments, require_finite, squared_column_norms
from methods.moe.least_squares import ExpertGrams
from methods.moe.micro_experts import SHARED, expert_spans, expert_view


def energy(
    moments: Moments, norm_square_N: Tensor, alpha: float, tokens: int | None = None
) -> Tensor:
    """Return E, float64 [N], from the moments and the squared norms of the down columns.

    In the paper the sum grows with the number of tokens while the peak does not, so the effect of
    an α depends on the amount of calibration text. If `tokens` is given, the sum is divided by it,
    which removes that dependence (not in the paper).
    """
    square_N = moments.square_sum_N if tokens is None else moments.square_sum_N / tokens
    return ((1 - alpha) * square_N + alpha * moments.peak_square_N.double()) * norm_square_N


Alpha = Annotated[float, Field(ge=0, le=1)] | Literal["paper", "low_peak", "official"]
_OFFICIAL = {"deepseek": 0.90}
_OFFICIAL_DEFAULT = 1.0
_PEAK_WEIGHTS = {"qwen3_moe": 1.0}
_DEFAULT_PEAK_WEIGHT = 0.95


def resolve_alpha(alpha: Alpha, model_type: str) -> float:
    """Return α as a number; a name is looked up for the model type (see the module docstring)."""
    if not isinstance(alpha, str):
        return alpha
    if alpha == "official":
        return _OFFICIAL.get(model_type, _OFFICIAL_DEFAULT)
    peak = _PEAK_WEIGHTS.get(model_type, _DEFAULT_PEAK_WEIGHT)
    # Rounded, so that 1 - 0.95 is 0.05 in the record and not 0.050000000000000044.
    return peak if alpha == "paper" else round(1 - peak, 12)


class BlockEnergies:
    """Observer of one block that accumulates the statistics from which energies are computed.

    `tokens` counts all tokens and `tokens_per_expert` [E] those routed to each expert;
    `output_power` is Σ_t ‖y_t‖² of the block output. `grams`, if given, accumulates what a refit
    needs.
    """

    def __init__(self, block: MoEBlock, grams: ExpertGrams | None = None) -> None:
        device = expert_view(block, 0).down.device
        self.block = block
        # Fed from here, because a second pass over the calibration text would be expensive.
        self.grams = grams
        self.tokens = 0
        self.tokens_per_expert = [0] * block.num_experts
        self.output_power = 0.0
        self._spans = dict(expert_spans(block))
        self._moments = Moments(block.micro_experts, device)

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one routed expert."""
        self.tokens_per_expert[expert] += len(x_SD)
        self._moments.add(self._spans[expert], hidden_SF, weight_S)
        if self.grams is not None:
            self.grams.routed(expert, x_SD, hidden_SF, weight_S)

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """Add all tokens of the shared experts."""
        self._moments.add(self._spans[SHARED], hidden_TF, weight_T)
        if self.grams is not None:
            self.grams.shared(x_TD, hidden_TF, weight_T)

    def output(self, y_TD: Tensor) -> None:
        """Add the power of the block output."""
        self.tokens += len(y_TD)
        self.output_power += float(y_TD.float().square().sum(dtype=torch.float64))

    def energies(self, alpha: float, *, normalised: bool) -> Tensor:
        """Return the energies in flat order, float64 [N], computed with the current weights.

        Raises:
            UserError: an activation was NaN or infinite.
        """
        # `_spans` is in flat order, so the concatenated norms line up with the moments.
        norms = [
            squared_column_norms(expert_view(self.block, expert).down) for expert in self._spans
        ]
        tokens = self.tokens if normalised else None
        energy_N = energy(self._moments, torch.cat(norms), alpha, tokens)
        require_finite(self.block, energy_N)
        return energy_N
