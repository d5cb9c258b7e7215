"""Least-squares refit of the kept down columns, to compensate for the removed ones.

Shapes: S tokens of one expert, F its width, K the kept micro-experts, R the removed ones, D
d_model.

After the micro-experts R of an expert are removed, the kept columns W_K are replaced by the V that
minimises the error of the expert's output, with φ including the router weight:

    min_V ‖Φ_R W_R + Φ_K (W_K - V)‖²   =>   V = W_K + (Φ_KᵀΦ_K)⁻¹ Φ_KᵀΦ_R W_R

where a row of W is a down column. The only statistic needed is the Gram matrix ΦᵀΦ, [F, F]. Damping
adds λ‖V - W_K‖² to the error, which pulls V towards W_K and not towards zero. The error of V is
therefore never above that of W_K, and an expert that no calibration token reached is unchanged. The
limit λ → 0 is ordinary least squares. CAMERA itself does not refit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.errors import UserError
from bench.models.structure.moe_block import MoEBlock
from methods.moe.calibration import Gram, NullObserver
from methods.moe.micro_experts import SHARED, complement, expert_spans, expert_view


class ExpertGrams(NullObserver):
    """Observer that accumulates ΦᵀΦ of every expert of a block.

    Products and sums are float64, since ΦᵀΦ has the squared condition number of Φ.
    """

    def __init__(self, block: MoEBlock) -> None:
        device = expert_view(block, 0).down.device
        self.block = block
        self.grams = {
            expert: Gram.empty(span.stop - span.start, device, torch.float64)
            for expert, span in expert_spans(block)
        }

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one routed expert."""
        phi_SF = hidden_SF.double() * weight_S.double()[:, None]
        self.grams[expert].add(phi_SF)

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """Add all tokens of the shared experts."""
        self.routed(SHARED, x_TD, hidden_TF, weight_T)


def refit_columns(gram_FF: Tensor, down_DF: Tensor, kept_K: Tensor, damping: float) -> Tensor:
    """Return the refitted kept down columns, float64 [D, K].

    `damping` is λ relative to the mean of the diagonal of Φ_KᵀΦ_K.
    """
    removed_R = complement(kept_K.to(gram_FF.device), len(gram_FF))
    gram_KK, gram_KR = gram_FF[kept_K][:, kept_K], gram_FF[kept_K][:, removed_R]
    removed_RD = down_DF.double()[:, removed_R].T
    kept_KD = down_DF.double()[:, kept_K].T
    scale = float(gram_KK.diagonal().mean()) if len(kept_K) else 0.0
    # Nothing to fit: no calibration token reached this expert, or none of its columns is kept.
    if not scale:
        return kept_KD.T
    # The solve below gives the update V - W_K, so the ridge penalises the change of the columns and
    # not the columns themselves.
    ridge_KK = gram_KK + damping * scale * torch.eye(
        len(kept_K), dtype=gram_KK.dtype, device=gram_KK.device
    )
    # cholesky_ex reports a failure instead of raising, so that the error can name the option.
    factor, failed = torch.linalg.cholesky_ex(ridge_KK)
    if bool(failed):
        raise UserError(f"refit_damping={damping} is too small for this calibration text: raise it")
    return (kept_KD + torch.cholesky_solve(gram_KR @ removed_RD, factor)).T


def refit_flops(width: int, kept: int, d_model: int) -> float:
    """Return the FLOPs of one refit with both of its errors, for an estimate.

    K³/3 for the factor, 2·K·R·D for the right side, 2·K²·D for the solve and 2·F²·D for each error,
    all in float64, which counts twice.
    """
    solve = kept**3 / 3 + 2 * kept * (width - kept) * d_model + 2 * kept**2 * d_model
    return 2 * (solve + 4 * width**2 * d_model)


def refit_error(gram_FF: Tensor, down_DF: Tensor, kept_K: Tensor, columns_DK: Tensor) -> float:
    """Return ‖Φ W - Φ_K V‖², summed over tokens, where columns V replace all of W."""
    # Tr(Δ G Δᵀ), where Δ is W - V on kept columns and W on removed ones, needs no tokens.
    difference_DF = down_DF.double().clone()
    difference_DF[:, kept_K] -= columns_DK.double()
    # Unchanged columns add nothing to the error. Without a refit, those are all kept columns.
    changed_C = difference_DF.any(0).nonzero()[:, 0]
    difference_DC = difference_DF[:, changed_C]
    gram_CC = gram_FF[changed_C][:, changed_C]
    return float((difference_DC @ gram_CC * difference_DC).sum())


@torch.no_grad()
def refit_experts(
    grams: ExpertGrams, removed: dict[int, Tensor], damping: float
) -> dict[str, float]:
    """Refit, in place, every expert that loses micro-experts; return the errors before and after.

    `removed` maps an expert to the indices of the micro-experts it loses; their columns are left
    unchanged. The errors are sums over experts, without the cancellation between experts that share
    a token.
    """
    before = after = 0.0
    for expert, removed_R in removed.items():
        down_DF, gram_FF = expert_view(grams.block, expert).down, grams.grams[expert].total
        kept_K = complement(removed_R.to(down_DF.device), down_DF.shape[1])
        # Rounded to the stored dtype first, so that the error is that of the stored columns.
        columns_DK = refit_columns(gram_FF, down_DF, kept_K, damping).to(down_DF.dtype)
        before += refit_error(gram_FF, down_DF, kept_K, down_DF[:, kept_K])
        after += refit_error(gram_FF, down_DF, kept_K, columns_DK)
        down_DF[:, kept_K] = columns_DK
    return {"error_before": before, "error_after": after}
