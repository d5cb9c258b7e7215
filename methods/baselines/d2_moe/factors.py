"""Optimal low-rank approximation of a difference on the calibration inputs.

Shapes: O outputs, I inputs, R rank, S tokens.

For inputs X [S, I] with Gram matrix H = Xᵀ X = L Lᵀ, ‖(Δ - U V) Xᵀ‖_F = ‖(Δ - U V) L‖_F. The
truncated SVD of Δ L, multiplied by L⁻¹, is therefore optimal for its rank (SVD-LLM, arXiv
2403.07378).
"""

from __future__ import annotations

import torch
from torch import Tensor


def factorise(
    delta_OI: Tensor, gram_II: Tensor, rank: int, damping: float
) -> tuple[Tensor, Tensor]:
    """Return U [O, R] and V [R, I], float64, with singular values split evenly between them.

    `damping` times the mean diagonal of H is added to its diagonal, since H is singular for an
    expert with fewer tokens than inputs. An expert without tokens gets the plain SVD.
    """
    root_II = _root(gram_II.double(), damping)
    left_OK, value_K, right_KI = torch.linalg.svd(delta_OI.double() @ root_II, full_matrices=False)
    # Square roots on both sides balance the magnitudes of U and V, which are stored in half
    # precision.
    share_R = value_K[:rank].sqrt()
    # Solves V L = right instead of inverting L.
    right_RI = torch.linalg.solve_triangular(root_II, right_KI[:rank], upper=False, left=False)
    return left_OK[:, :rank] * share_R, share_R[:, None] * right_RI


def _root(gram_II: Tensor, damping: float) -> Tensor:
    """Return L, lower triangular, with L Lᵀ = H + damping · mean(diag H) · I."""
    identity_II = torch.eye(len(gram_II), dtype=gram_II.dtype, device=gram_II.device)
    scale = gram_II.diagonal().mean()
    # Written so that NaN takes this branch as well.
    if not scale > 0:
        return identity_II
    root_II: Tensor = torch.linalg.cholesky(gram_II + damping * scale * identity_II)
    return root_II
