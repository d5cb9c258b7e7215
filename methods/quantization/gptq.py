"""GPTQ (arXiv 2210.17323): round column by column, compensating each error in the later columns.

Shapes: R rows, C columns, c columns of one group.

With H the Hessian of the output error, rounding column q of a row costs (w_q - ŵ_q)² / [H_F⁻¹]_qq,
where F are the columns not yet rounded, and the optimal update of those is δ_F = -(w_q - ŵ_q) /
[H_F⁻¹]_qq · (H_F⁻¹)_:q (equations 2 and 3). The Cholesky factor U of H⁻¹, Uᵀ U = H⁻¹, holds all of
these rows: (H_F⁻¹)_:q / [H_F⁻¹]_qq = U_q: / U_qq. Rows of the matrix are independent, so each may
have its own bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.quantization.grid import Clip, Grid, Quantized, fit


def gptq(
    weight_RC: Tensor,
    factor_CC: Tensor,
    groups: list[slice],
    bits_RG: Tensor,
    clip: Clip = "minmax",
) -> Quantized:
    """Return the quantized matrix, given U with Uᵀ U = H⁻¹ of its damped Hessian.

    A group's grid is fitted when its first column is reached, to the weights as updated by then.
    Everything is computed in the dtype of `factor_CC`.
    """
    left_RC = weight_RC.to(factor_CC.dtype, copy=True)
    codes_RC = torch.zeros_like(left_RC, dtype=torch.uint8)
    scale_RG = torch.zeros_like(bits_RG, dtype=torch.float16)
    offset_RG = torch.zeros_like(scale_RG)
    for number, group in enumerate(groups):
        # Fitted to the compensated weights, since these are rounded, not the original ones.
        grid = fit(left_RC[:, group], bits_RG[:, number], clip)
        codes_Rc, error_Rc = _group(left_RC[:, group], factor_CC[group, group], grid)
        # Equation 3 for all later groups at once. An update of a column beyond the group is linear
        # in the errors of the group's columns, so it can wait until the group is done and become
        # one matrix product (the paper's lazy batch updates).
        left_RC[:, group.stop :] -= error_Rc @ factor_CC[group, group.stop :]
        codes_RC[:, group] = codes_Rc.to(torch.uint8)
        scale_RG[:, number] = grid.scale[:, 0].half()
        offset_RG[:, number] = grid.offset[:, 0].half()
    return Quantized(codes_RC, scale_RG, offset_RG)


def _group(weight_Rc: Tensor, factor_cc: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Round one group; return its codes and (w - ŵ) / U_qq of every column."""
    # The argument is a view of the caller's matrix, whose columns are not to be changed here.
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
