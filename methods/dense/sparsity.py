"""Masks of single weights of a matrix: magnitude, Wanda, SparseGPT.

Shapes: R rows (outputs), C columns (inputs), c columns of one block.

A mask is True where a weight is zeroed. A pattern n:m zeroes n of every m consecutive inputs of a
row, which sparse tensor cores can skip; None is unstructured sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from bench.errors import UserError

DAMPING = 0.01
BLOCK = 128


@dataclass(frozen=True)
class Pattern:
    """n zeros in every m consecutive inputs of a row."""

    zeros: int
    run: int

    @property
    def ratio(self) -> Fraction:
        """Share of weights that are zeroed."""
        return Fraction(self.zeros, self.run)

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        """Read `2:4`, n zeros in m; None for `unstructured`."""
        if text == "unstructured":
            return None
        zeros, run = map(int, text.split(":"))
        return cls(zeros, run)


def count_zeroed(ratio: float, weights: int) -> int:
    """Return ⌊ratio · weights⌋, exactly for the decimal as typed; in floats 0.29 * 100 < 29."""
    return int(Fraction(repr(ratio)) * weights)


def magnitude_mask(weight_RC: Tensor, ratio: float, pattern: Pattern | None) -> Tensor:
    """Mask the smallest absolute weights of a matrix, ranked over the whole matrix."""
    if pattern is not None:
        return _pattern_mask(weight_RC.abs(), pattern)
    flat = weight_RC.abs().flatten()
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.argsort(stable=True)[: count_zeroed(ratio, len(flat))]] = True
    return mask.view_as(weight_RC)


def wanda_mask(weight_RC: Tensor, norm_C: Tensor, ratio: float, pattern: Pattern | None) -> Tensor:
    """Mask the lowest scores |w| ‖x_c‖₂ of every row (Wanda, arXiv 2306.11695, equation 1).

    Every row is ranked separately, which according to the paper's ablation is essential for
    language models.
    """
    score_RC = weight_RC.abs().float() * norm_C.float()
    if pattern is not None:
        return _pattern_mask(score_RC, pattern)
    mask_RC = torch.zeros_like(score_RC, dtype=torch.bool)
    count = count_zeroed(ratio, score_RC.shape[1])
    return mask_RC.scatter_(1, score_RC.argsort(dim=1, stable=True)[:, :count], True)


def sparsegpt(
    weight_RC: Tensor, hessian_CC: Tensor, ratio: float, pattern: Pattern | None, block: int = BLOCK
) -> Tensor:
    """Return the pruned and repaired matrix in float32 (SparseGPT, arXiv 2301.00774, algorithm 1).

    `hessian_CC` is Σ x xᵀ over the calibration tokens; a constant factor has no effect, since the
    damping is relative to its diagonal. Columns are visited from left to right, and the error of
    each is compensated in the later ones. Without a pattern, the weights of a block of columns are
    ranked jointly over all rows by w² / U_cc², before the first column of the block is visited. As
    in the released code, the threshold is the sorted score with index int(rows · columns · ratio),
    inclusive, so one more weight is zeroed than the ratio says.

    Raises:
        UserError: the damped Hessian is not positive definite.
    """
    left_RC = weight_RC.float().clone()
    if ratio == 0 and pattern is None:
        return left_RC
    factor_CC, dead_C = _inverse_factor(hessian_CC)
    # Weights of inputs that were always zero have no effect on any output.
    left_RC[:, dead_C] = 0
    columns = left_RC.shape[1]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        here_Rc, factor_cc = left_RC[:, start:stop].clone(), factor_CC[start:stop, start:stop]
        score_Rc = (here_Rc / factor_cc.diagonal()).square()
        mask_Rc = torch.zeros_like(score_Rc, dtype=torch.bool)
        if pattern is None:
            place = int(score_Rc.numel() * Fraction(repr(ratio)))
            mask_Rc = score_Rc <= score_Rc.flatten().sort().values[place]
        error_Rc = torch.zeros_like(here_Rc)
        for column in range(stop - start):
            if pattern is not None and column % pattern.run == 0:
                # The mask of a run is chosen when the run is reached, on the compensated weights.
                run = slice(column, column + pattern.run)
                score_Rm = (here_Rc[:, run] / factor_cc.diagonal()[run]).square()
                mask_Rc[:, run] = _pattern_mask(score_Rm, pattern)
            kept_R = here_Rc[:, column].masked_fill(mask_Rc[:, column], 0)
            error_R = (here_Rc[:, column] - kept_R) / factor_cc[column, column]
            here_Rc[:, column:] -= error_R[:, None] * factor_cc[column, None, column:]
            # Assigned, because the subtraction above leaves rounding errors instead of zeros.
            here_Rc[:, column] = kept_R
            error_Rc[:, column] = error_R
        left_RC[:, start:stop] = here_Rc
        left_RC[:, stop:] -= error_Rc @ factor_CC[start:stop, stop:]
    return left_RC


def _inverse_factor(hessian_CC: Tensor) -> tuple[Tensor, Tensor]:
    """Return U upper triangular with Uᵀ U = (H + λ I)⁻¹, and which inputs were always zero."""
    # In float64, because H is ill-conditioned and is factorized, inverted and factorized again.
    damped_CC = hessian_CC.double().clone()
    diagonal_C = damped_CC.diagonal()
    dead_C = diagonal_C == 0
    diagonal_C[dead_C] = 1
    diagonal_C += DAMPING * diagonal_C.mean()
    lower_CC, failed = torch.linalg.cholesky_ex(damped_CC)
    if int(failed) or not bool(lower_CC.isfinite().all()):
        raise UserError(
            "the calibration text gives a Hessian that is not positive definite: use more "
            "calibration rows, or model.dtype=float32"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower_CC), upper=True).float(), dead_C


def _pattern_mask(score_RC: Tensor, pattern: Pattern) -> Tensor:
    """Mask the `zeros` lowest scores of every run; columns must be a multiple of the run."""
    runs_RNm = score_RC.unflatten(1, (-1, pattern.run))
    order_RNm = runs_RNm.argsort(dim=2, stable=True)[..., : pattern.zeros]
    mask_RNm = torch.zeros_like(runs_RNm, dtype=torch.bool).scatter_(2, order_RNm, True)
    return mask_RNm.flatten(1)
