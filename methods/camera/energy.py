"""CAMERA's energy: the contribution of a micro-expert to the output of its layer.

Shapes: S tokens of one expert, F its width, N micro-experts of a layer (shared ones first).

With φ_ti the coefficient of micro-expert i on token t, router weight included, and w_i its down
column, the layer's routed output is y_t = Σ_i φ_ti w_i. Then (arXiv 2508.02322, section 3)

    E_i = [ (1 - α) · ‖φ_i‖₂² + α · ‖φ_i‖∞² ] · ‖w_i‖₂²

in squared activation times squared weight. At α = 0 it is exactly the squared error that removing i
alone causes in the layer's output, summed over tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Σ_t φ² and max_t φ² of N micro-experts, accumulated chunk by chunk.

    Each chunk is computed in float32 and accumulated in float64, so that neither the chunk size nor
    the model's half precision affects a ranking. Tokens not routed to an expert have φ = 0 and need
    not be added.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.square_sum_N = torch.zeros(count, dtype=torch.float64, device=device)
        self.peak_square_N = torch.zeros(count, dtype=torch.float32, device=device)

    def add(self, where: slice, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add φ = weight · hidden of the micro-experts in the slice `where`; S must not be zero."""
        square_SF = (hidden_SF.float() * weight_S.float()[:, None]).square_()
        self.square_sum_N[where] += square_SF.sum(0)
        # A slice is a view, so the maximum is written into the moments in place.
        peak_square_F = self.peak_square_N[where]
        torch.maximum(peak_square_F, square_SF.amax(0), out=peak_square_F)


def energy(
    moments: Moments, norm_square_N: Tensor, alpha: float, tokens: int | None = None
) -> Tensor:
    """Return E, float64 [N], from the moments and the squared norms of the down columns.

    The paper's sum grows with the number of tokens while its peak does not, so the effect of one α
    depends on the amount of calibration text. With `tokens` the sum is replaced by the mean over
    that many tokens (not in the paper), which removes the dependence.
    """
    square_N = moments.square_sum_N if tokens is None else moments.square_sum_N / tokens
    return ((1 - alpha) * square_N + alpha * moments.peak_square_N.double()) * norm_square_N


def column_norms(down_DF: Tensor) -> Tensor:
    """Return the squared norm ‖w_i‖₂² of every column of a down matrix, float64 [F]."""
    # Squares in float32, summed in float64: in half precision they could overflow.
    return down_DF.float().square().sum(0, dtype=torch.float64)
