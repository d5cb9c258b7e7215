"""Which atoms of a layer to keep: by energy, by the envelope, by its homotopy, by elimination.

Shapes: M atoms, D outputs.

All return a read-out V [M, D] in which dropped atoms are zero; `Reconstruction.refit` improves any.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.wgsef.envelope.prox import Shrinkage, debiased, envelope, hard
from methods.wgsef.layerwise.problem import Reconstruction
from methods.wgsef.training.schedule import homotopy


def by_energy(problem: Reconstruction, k: int) -> Tensor:
    """Keep the k atoms of largest ||v_j||: hard selection at the true read-out."""
    return _apply(hard(_norms(problem.readout), k), problem.readout)


def by_envelope(problem: Reconstruction, k: int, lam: float, steps: int = 400) -> Tensor:
    """Minimise error + lam F_k by FISTA with step 1/L; convex, so it finds the global optimum.

    After T steps the objective is within 2 L ||V - V*||^2 / (T + 1)^2 (Beck and Teboulle, 2009).
    It seldom leaves exactly k atoms (specification section 5, demo).
    """
    smooth = _largest_eigenvalue(problem.gram)
    v_MD = ahead_MD = problem.readout
    momentum = 1.0
    for _ in range(steps):
        t_MD = _descend(problem, ahead_MD, smooth)
        next_MD = _apply(envelope(_norms(t_MD), k, lam / smooth), t_MD)
        faster = 0.5 * (1 + (1 + 4 * momentum**2) ** 0.5)
        ahead_MD = next_MD + (momentum - 1) / faster * (next_MD - v_MD)
        v_MD, momentum = next_MD, faster
    return v_MD


def by_homotopy(problem: Reconstruction, k: int, steps: int = 400) -> Tensor:
    """Follow the debiased operator from ratio 0 to 1; the result has k atoms by construction."""
    smooth = _largest_eigenvalue(problem.gram)
    v_MD = problem.readout
    for step in range(1, steps):
        t_MD = _descend(problem, v_MD, smooth)
        v_MD = _apply(debiased(_norms(t_MD), k, homotopy(step / steps)), t_MD)
    return _apply(hard(_norms(v_MD), k), v_MD)


def by_elimination(problem: Reconstruction, k: int, damping: float = 1e-8) -> Tensor:
    """Take one atom away at a time, the one whose loss the others make up for best.

    Greedy backward elimination (optimal brain surgeon): with H the inverse Gram matrix of what is
    left and V its least-squares read-out, dropping j costs ||v_j||^2 / (2 H_jj) and the others
    move by -H_ij v_j / H_jj. O(M^3) for a layer.
    """
    gram_MM = problem.gram.clone()
    gram_MM.diagonal().add_(damping * gram_MM.diagonal().mean())
    inverse_MM = torch.linalg.inv(gram_MM)
    v_MD: Tensor = inverse_MM @ problem.target
    gone_M = torch.zeros(len(v_MD), dtype=torch.bool, device=v_MD.device)
    for _ in range(len(v_MD) - k):
        cost_M = v_MD.square().sum(-1) / inverse_MM.diagonal()
        j = int(cost_M.masked_fill(gone_M, torch.inf).argmin())
        share_M = inverse_MM[:, j] / inverse_MM[j, j]
        v_MD = v_MD - share_M[:, None] * v_MD[j]
        inverse_MM = inverse_MM - share_M[:, None] * inverse_MM[j]
        gone_M[j] = True
        # The column of a dropped atom is zero but for rounding, which must not be divided by.
        inverse_MM[j, :] = inverse_MM[:, j] = 0
        inverse_MM[j, j] = 1
    v_MD[gone_M] = 0
    return v_MD


def _descend(problem: Reconstruction, v_MD: Tensor, smooth: float) -> Tensor:
    """Return the gradient step of length 1/L on the error."""
    step_MD: Tensor = (problem.gram @ v_MD - problem.target) / smooth
    return v_MD - step_MD


def _largest_eigenvalue(gram_MM: Tensor) -> float:
    return float(torch.linalg.eigvalsh(gram_MM)[-1])


def _norms(v_MD: Tensor) -> Tensor:
    norm_M: Tensor = v_MD.norm(dim=-1)
    return norm_M[None]


def _apply(shrinkage: Shrinkage, t_MD: Tensor) -> Tensor:
    scaled_MD: Tensor = shrinkage.scale[0][:, None] * t_MD
    return scaled_MD
