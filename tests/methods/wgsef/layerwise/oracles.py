"""Selections for a single problem, as oracles of the joint ones."""

from __future__ import annotations

from torch import Tensor

from methods.wgsef.layerwise.reconstruction import (
    BackwardElimination,
    Reconstruction,
    _shrink_atoms,
    gradient_step,
    largest_eigenvalue,
)
from methods.wgsef.prox.operators import prox_debiased, prox_envelope, select_top_k
from methods.wgsef.solvers.schedules import homotopy_ratio


def by_energy(problem: Reconstruction, k: int) -> Tensor:
    """Keep the k atoms of largest ||v_j||: hard selection at the true read-out."""
    return _shrink_atoms(problem, select_top_k, problem.readout, k)


def by_envelope(problem: Reconstruction, k: int, lam: float, steps: int = 400) -> Tensor:
    """Minimise error + lam F_k by FISTA with step 1/L; convex, so it finds the global optimum.

    After T steps the objective is within 2 L ||V - V*||^2 / (T + 1)^2 (Beck and Teboulle, 2009). It
    seldom leaves exactly k atoms (specification section 5, demo).
    """
    smooth = largest_eigenvalue(problem.gram)
    v_MD = ahead_MD = problem.readout
    momentum = 1.0
    for _ in range(steps):
        t_MD = gradient_step(problem, ahead_MD, smooth)
        next_MD = _shrink_atoms(problem, prox_envelope, t_MD, k, lam / smooth)
        faster = 0.5 * (1 + (1 + 4 * momentum**2) ** 0.5)
        ahead_MD = next_MD + (momentum - 1) / faster * (next_MD - v_MD)
        v_MD, momentum = next_MD, faster
    return v_MD


def by_homotopy(problem: Reconstruction, k: int, steps: int = 400) -> Tensor:
    """Follow the debiased operator from ratio 0 to 1; the result has k atoms by construction."""
    smooth = largest_eigenvalue(problem.gram)
    v_MD = problem.readout
    for step in range(1, steps):
        t_MD = gradient_step(problem, v_MD, smooth)
        v_MD = _shrink_atoms(problem, prox_debiased, t_MD, k, homotopy_ratio(step / steps))
    return _shrink_atoms(problem, select_top_k, v_MD, k)


def by_elimination(problem: Reconstruction, k: int, damping: float = 1e-8) -> Tensor:
    """Remove one atom at a time, the one whose loss the remaining ones compensate best.

    Greedy backward elimination (optimal brain surgeon): with H the inverse Gram matrix of the
    remaining atoms and V their least-squares read-out, dropping j costs tr(v_j^T H_jj^-1 v_j) / 2
    and the others move by -H_ij H_jj^-1 v_j. O(M^3) for a layer.
    """
    elimination = BackwardElimination(problem, damping)
    for _ in range(problem.atoms - k):
        elimination.drop(elimination.cheapest()[1])
    return elimination.v_MD
