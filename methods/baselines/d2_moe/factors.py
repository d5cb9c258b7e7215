"""The best low-rank form of a difference for the inputs that it meets.

Shapes: O outputs, I inputs, R rank, S tokens.

For inputs X [S, I] with Gram matrix H = Xᵀ X = L Lᵀ, ‖(Δ - U V) Xᵀ‖_F = ‖(Δ - U V) L‖_F. So the
truncated SVD of Δ L, with L⁻¹ multiplied back, is the best of its rank (SVD-LLM, arXiv 2403.07378).
"""

from __future__ import annotations

import torch
from torch import Tensor


def factorise(
    delta_OI: Tensor, gram_II: Tensor, rank: int, damping: float
) -> tuple[Tensor, Tensor]:
    """Return U [O, R] and V [R, I], float64, the singular values shared evenly between them.

    `damping` times H's mean diagonal is added to its diagonal: an expert that met fewer tokens
    than it has inputs has a singular H. One that met none gets the plain SVD.
    """
    root_II = _root(gram_II.double(), damping)
    left_OK, value_K, right_KI = torch.linalg.svd(delta_OI.double() @ root_II, full_matrices=False)
    share_R = value_K[:rank].sqrt()
    right_RI = torch.linalg.solve_triangular(root_II, right_KI[:rank], upper=False, left=False)
    return left_OK[:, :rank] * share_R, share_R[:, None] * right_RI


def _root(gram_II: Tensor, damping: float) -> Tensor:
    """Return the lower triangular L with L Lᵀ = H + damping."""
    identity_II = torch.eye(len(gram_II), dtype=gram_II.dtype, device=gram_II.device)
    scale = gram_II.diagonal().mean()
    if not scale > 0:
        return identity_II
    root_II: Tensor = torch.linalg.cholesky(gram_II + damping * scale * identity_II)
    return root_II
