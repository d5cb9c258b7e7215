"""Selections for a single problem, as oracles of the joint ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from methods.wgsef.layerwise.reconstruction import (
    HOMOTOPY_STEPS,
    BackwardElimination,
    Reconstruction,
)
from methods.wgsef.prox.operators import Shrinkage, prox_envelope, select_top_k
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


def by_homotopy(problem: Reconstruction, k: int, steps: int = HOMOTOPY_STEPS) -> Tensor:
    """Alternate between gates and a dense ridge regression; the result has k atoms."""
    v_MD = problem.readout
    eye_MM = torch.eye(len(v_MD), dtype=v_MD.dtype)
    for step in range(1, steps):
        ratio = homotopy_ratio(step / steps)
        gate_A = gates_by_sorting(problem.norms(v_MD)[0], k)
        ridge_M = (1 / gate_A - 1).repeat_interleave(problem.width) * ratio / (1 - ratio)
        gram_MM = problem.gram + 1e-8 * eye_MM
        v_MD = torch.linalg.solve(gram_MM + ridge_M.diag(), gram_MM @ problem.readout)
    return _shrink_atoms(problem, select_top_k, v_MD, k)


def gates_by_sorting(norm_A: Tensor, k: int) -> Tensor:
    """Return u = min(1, eta norm) of sum k: the w largest are whole, the others share the rest."""
    order = norm_A.argsort(descending=True)
    for whole in range(k + 1):
        rest = norm_A[order[whole:]].sum()
        eta = (k - whole) / rest if rest > 0 else torch.inf
        gate_A = (eta * norm_A).clamp(1e-12, 1)
        gate_A[order[:whole]] = 1
        if whole == len(norm_A) or eta * norm_A[order[whole]] <= 1:
            return gate_A
    raise AssertionError("no number of whole atoms fits")


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


def gradient_step(problem: Reconstruction, v_MD: Tensor, smooth: float) -> Tensor:
    """Return the gradient step of length 1/L on the error."""
    step_MD: Tensor = (problem.gram @ v_MD - problem.target) / smooth
    return v_MD - step_MD


def largest_eigenvalue(gram_MM: Tensor) -> float:
    """Return the smoothness constant L of the error, by which steps are divided."""
    return float(torch.linalg.eigvalsh(gram_MM)[-1])


def _shrink_atoms(
    problem: Reconstruction, operator: Callable[..., Shrinkage], t_MD: Tensor, *knobs: float
) -> Tensor:
    """Shrink or drop the atoms of a read-out by an operator on their norms."""
    return problem.scaled(t_MD, operator(problem.norms(t_MD), *knobs).scale[0])
