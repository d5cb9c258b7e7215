"""GPTQ (arXiv 2210.17323): round column by column, compensating each error in the later columns.

Shapes: S tokens, R rows, C columns, c columns of one group.

With outputs y = W x, replacing W by Ŵ = W - Δ causes the squared error Σ_t ‖Δ x_t‖² = tr(Δ H Δᵀ)
over the calibration tokens, with the Hessian H = Σ_t x_t x_tᵀ (up to a factor). Rounding column q
of a row costs (w_q - ŵ_q)² / [H_F⁻¹]_qq, where F are the columns not yet rounded. The optimal
update of these is (equations 2 and 3)

    δ_F = -(w_q - ŵ_q) / [H_F⁻¹]_qq · (H_F⁻¹)_:q

The Cholesky factor U of H⁻¹, Uᵀ U = H⁻¹, holds all of these columns: (H_F⁻¹)_:q / [H_F⁻¹]_qq =
U_q: / U_qq. Rows of the matrix are independent, so each may have its own bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.models.bitpacking.packed_shape import GridKind
from methods.moe.calibration import Gram
from methods.moe.quantizer.grid import Clip, QuantGrid, QuantizedMatrix, quantize_groups

# Attempts to factorize a Hessian; the damping grows tenfold after each failure.
MAX_DAMPING_ATTEMPTS = 4
COLUMN_OPERATORS = 28
"""Operators per column, views included: codes, values, error and compensation."""


def column_walk_flops(rows: int, columns: int) -> float:
    """Return the FLOPs of the walk over the columns of one matrix, without its Gram matrix.

    4/3·C³ for two Cholesky factors and an inverse in float64, which counts twice, and R·C² for the
    compensation. SparseGPT's walk takes as many.
    """
    return 2 * 4 / 3 * columns**3 + rows * columns**2


def gptq(
    weight_RC: Tensor,
    factor_CC: Tensor,
    groups: list[slice],
    bits_RG: Tensor,
    clip: Clip = "minmax",
    kind: GridKind = "offset",
) -> QuantizedMatrix:
    """Quantize a matrix, given the factor U, Uᵀ U = H⁻¹, of its damped Hessian H.

    The grid of a group is fitted when its first column is reached, to the weights as updated so
    far. Everything is computed in the dtype of `factor_CC`.
    """
    left_RC = weight_RC.to(factor_CC.dtype, copy=True)

    def round_group(group: slice, grid: QuantGrid) -> Tensor:
        codes_Rc, error_Rc = _round_group(left_RC[:, group], factor_CC[group, group], grid)
        # Equation 3 for all later groups at once. An update of a column beyond the group is linear
        # in the errors of the group's columns, so it can wait until the group is done and become
        # one matrix product (the paper's lazy batch updates).
        left_RC[:, group.stop :] -= error_Rc @ factor_CC[group, group.stop :]
        return codes_Rc

    # `left_RC` changes while it is being quantized, so each grid is fitted to the compensated
    # weights, which are the ones that are rounded.
    return quantize_groups(left_RC, groups, bits_RG, clip, round_group, kind)


def _round_group(weight_Rc: Tensor, factor_cc: Tensor, grid: QuantGrid) -> tuple[Tensor, Tensor]:
    """Round one group; return its codes and (w - ŵ) / U_qq of every column."""
    # The argument is a view of the caller's matrix, which must not change here.
    left_Rc = weight_Rc.clone()
    codes_Rc, error_Rc = torch.empty_like(left_Rc), torch.empty_like(left_Rc)
    for column in range(left_Rc.shape[1]):
        here_R1 = left_Rc[:, column, None]
        codes_R1 = grid.codes(here_R1)
        # (w - ŵ) / U_qq times row q of U is the update of equation 3: U_q: / U_qq replaces
        # (H_F⁻¹)_:q / [H_F⁻¹]_qq, so no inverse has to be downdated per column. Row q of U is zero
        # left of q: columns already rounded are not touched.
        error_R1 = (here_R1 - grid.values(codes_R1)) / factor_cc[column, column]
        left_Rc[:, column:] -= error_R1 @ factor_cc[column, None, column:]
        codes_Rc[:, column], error_Rc[:, column] = codes_R1[:, 0], error_R1[:, 0]
    return codes_Rc, error_Rc


def inverse_factor(hessian: Gram, damping: float) -> tuple[Tensor, float] | None:
    """Return U upper triangular with Uᵀ U = (H + λ I)⁻¹, float64 [C, C], and the damping used.

    λ is `damping` times the mean of H's diagonal. `damping` is first scaled by columns / tokens if
    there are fewer tokens than columns, and then by ten after every failed factorization. Inputs
    that were always zero additionally get the mean diagonal. Returns None if H is zero or not
    finite, or if the last attempt fails too.
    """
    columns = len(hessian.total)
    diagonal_C = hessian.total.diagonal().double()
    mean = float(diagonal_C.mean()) if columns else 0.0
    if not 0 < mean < float("inf"):
        return None
    # The rank of H is at most the number of tokens, so H is singular with fewer tokens than
    # columns, and noisier the fewer they are.
    damping *= max(1.0, columns / hessian.tokens)
    # A dead input has a zero row and column, so any positive diagonal decouples it from the other
    # columns. The mean, not 1 as in the GPTQ code, keeps the matrix well scaled whatever the
    # magnitude of the activations.
    dead_C = diagonal_C == 0
    for _ in range(MAX_DAMPING_ATTEMPTS):
        # float64: H is ill-conditioned, and it is factorized, inverted and factorized again.
        damped_CC = hessian.total.double()
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
