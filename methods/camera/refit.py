"""Least-squares refit of the down columns that stay, so that they stand in for those that go.

Shapes: S tokens of one expert, F its width, K the micro-experts kept, R those removed, D d_model.

Removing micro-experts R of an expert leaves, with φ including the router's weight,

    min_V ‖Φ_R W_R + Φ_K (W_K - V)‖²   =>   V = W_K + (Φ_KᵀΦ_K)⁻¹ Φ_KᵀΦ_R W_R

where a row of W is a down column. All that calibration must give is the Gram matrix ΦᵀΦ, [F, F].
Damping pulls V towards W_K instead of towards zero: V minimises the error plus λ‖V - W_K‖², so its
error is never above that of W_K, and an expert that calibration never visited stays as it was. At
λ → 0 it is ordinary least squares. CAMERA itself does not refit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.errors import UserError
from bench.models.anatomy import MoEBlock
from methods.micro_experts import SHARED, spans, view


class Grams:
    """Gathers ΦᵀΦ of every expert of a block, as an observer of it.

    Products and sums are float64: the sum over tokens squares the condition of Φ.
    """

    def __init__(self, block: MoEBlock) -> None:
        device = view(block, 0).down.device
        self.block = block
        self.gram_FF = {
            expert: torch.zeros(width, width, dtype=torch.float64, device=device)
            for expert, width in ((e, place.stop - place.start) for e, place in spans(block))
        }

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one routed expert."""
        phi_SF = hidden_SF.double() * weight_S.double()[:, None]
        self.gram_FF[expert].addmm_(phi_SF.T, phi_SF)

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """Add all tokens of the shared experts."""
        self.routed(SHARED, x_TD, hidden_TF, weight_T)

    def output(self, y_TD: Tensor) -> None:
        """Need nothing of the block's output."""


def refitted(gram_FF: Tensor, down_DF: Tensor, kept_K: Tensor, damping: float) -> Tensor:
    """Return the down columns that stay, refitted: float64 [D, K].

    `damping` is λ relative to the mean of the diagonal of Φ_KᵀΦ_K.
    """
    removed = torch.ones(len(gram_FF), dtype=torch.bool, device=gram_FF.device)
    removed[kept_K] = False
    gram_KK, gram_KR = gram_FF[kept_K][:, kept_K], gram_FF[kept_K][:, removed]
    wide_RD = down_DF.double()[:, removed].T
    kept_KD = down_DF.double()[:, kept_K].T
    scale = float(gram_KK.diagonal().mean()) if len(kept_K) else 0.0
    if not scale:
        return kept_KD.T
    ridge_KK = gram_KK + damping * scale * torch.eye(
        len(kept_K), dtype=gram_KK.dtype, device=gram_KK.device
    )
    factor, failed = torch.linalg.cholesky_ex(ridge_KK)
    if bool(failed):
        raise UserError(f"refit_damping={damping} is too small for this calibration text")
    return (kept_KD + torch.cholesky_solve(gram_KR @ wide_RD, factor)).T


def error(gram_FF: Tensor, down_DF: Tensor, kept_K: Tensor, columns_DK: Tensor) -> float:
    """Return ‖Φ W - Φ_K V‖², summed over tokens, of columns V that stand for all of W."""
    difference_DF = down_DF.double().clone()
    difference_DF[:, kept_K] -= columns_DK.double()
    return float((difference_DF @ gram_FF * difference_DF).sum())


@torch.no_grad()
def refit(grams: Grams, removed: dict[int, Tensor], damping: float) -> dict[str, float]:
    """Refit every expert that loses micro-experts, in place, and return both summed errors.

    `removed` maps an expert to the micro-experts it loses; their own columns are left as they
    are. The errors, before and after, are those of the experts one by one, without what
    different experts' errors cancel or add up to on a token.
    """
    before = after = 0.0
    for expert, gone in removed.items():
        down_DF, gram_FF = view(grams.block, expert).down, grams.gram_FF[expert]
        stays = torch.ones(down_DF.shape[1], dtype=torch.bool, device=down_DF.device)
        stays[gone.to(down_DF.device)] = False
        kept_K = stays.nonzero().flatten()
        columns_DK = refitted(gram_FF, down_DF, kept_K, damping).to(down_DF.dtype)
        before += error(gram_FF, down_DF, kept_K, down_DF[:, kept_K])
        after += error(gram_FF, down_DF, kept_K, columns_DK)
        down_DF[:, kept_K] = columns_DK
    return {"error_before": before, "error_after": after}
