"""Second moment of the inputs of a matrix: the Hessian of its output error.

Shapes: S tokens, C input columns. With outputs y = W x, the squared error of a different Ŵ over the
calibration tokens is Σ_t ‖(W - Ŵ) x_t‖² = tr(Δ H Δᵀ), H = Σ_t x_t x_tᵀ (GPTQ, arXiv 2210.17323).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Attempts to factorize a Hessian; the damping grows tenfold after each failure.
ATTEMPTS = 4


class Hessian:
    """Σ_t x_t x_tᵀ in float32, [C, C], and the number of tokens in the sum."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum_CC = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x_SC: Tensor) -> None:
        """Add some tokens."""
        x_SC = x_SC.float()
        self.sum_CC.addmm_(x_SC.T, x_SC)
        self.tokens += len(x_SC)

    def ordered(self, order_C: Tensor) -> Hessian:
        """Return the Hessian of the given columns in the given order."""
        other = Hessian(0, self.sum_CC.device)
        other.sum_CC = self.sum_CC[order_C][:, order_C]
        other.tokens = self.tokens
        return other


def inverse_factor(hessian: Hessian, damping: float) -> tuple[Tensor, float] | None:
    """Return U upper triangular with Uᵀ U = (H + λ I)⁻¹, float64 [C, C], and the damping used.

    λ is `damping` times the mean of H's diagonal. The damping is scaled up by columns / tokens if
    there are fewer tokens than columns, and tenfold while the factorization still fails. Inputs
    that were always zero additionally get the mean diagonal. Returns None if no damping suffices,
    or if H is zero or not finite.
    """
    columns = len(hessian.sum_CC)
    diagonal_C = hessian.sum_CC.diagonal().double()
    mean = float(diagonal_C.mean()) if columns else 0.0
    if not 0 < mean < float("inf"):
        return None
    # H has rank at most `tokens`: with fewer tokens than columns it is singular, and the fewer
    # there are, the noisier are the directions that it does contain.
    damping *= max(1.0, columns / hessian.tokens)
    # A dead input has a zero row and column, so any positive diagonal decouples it from the other
    # columns. The mean, not 1 as in the GPTQ code, keeps the matrix well scaled whatever the
    # magnitude of the activations.
    dead_C = diagonal_C == 0
    for _ in range(ATTEMPTS):
        # float64: H is ill-conditioned, and it is factorized, inverted and factorized again.
        damped_CC = hessian.sum_CC.double()
        damped_CC.diagonal().add_(damping * mean + dead_C * mean)
        # cholesky_ex reports failure instead of raising: a singular Hessian is expected here.
        lower_CC, fault = torch.linalg.cholesky_ex(damped_CC)
        if not fault:
            inverse_CC = torch.cholesky_inverse(lower_CC)
            upper_CC, fault = torch.linalg.cholesky_ex(inverse_CC, upper=True)
            if not fault:
                return upper_CC, damping
        damping *= 10
    return None
