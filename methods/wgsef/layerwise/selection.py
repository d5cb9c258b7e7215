"""Selection of a layer's atoms: by energy, by the envelope, by its homotopy, by elimination.

Shapes: A atoms of B activations each, M = A B activations, D outputs.

All return a read-out V [M, D] in which dropped atoms are zero; `Reconstruction.refit` improves it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from methods.wgsef.envelope.prox import Shrinkage, debiased, envelope, hard
from methods.wgsef.layerwise.problem import Reconstruction, diagonal_blocks
from methods.wgsef.training.schedule import homotopy


def by_energy(problem: Reconstruction, k: int) -> Tensor:
    """Keep the k atoms of largest ||v_j||: hard selection at the true read-out."""
    return _apply(problem, hard, problem.readout, k)


def by_envelope(problem: Reconstruction, k: int, lam: float, steps: int = 400) -> Tensor:
    """Minimise error + lam F_k by FISTA with step 1/L; convex, so it finds the global optimum.

    After T steps the objective is within 2 L ||V - V*||^2 / (T + 1)^2 (Beck and Teboulle, 2009). It
    seldom leaves exactly k atoms (specification section 5, demo).
    """
    smooth = largest_eigenvalue(problem.gram)
    v_MD = ahead_MD = problem.readout
    momentum = 1.0
    for _ in range(steps):
        t_MD = descend(problem, ahead_MD, smooth)
        next_MD = _apply(problem, envelope, t_MD, k, lam / smooth)
        faster = 0.5 * (1 + (1 + 4 * momentum**2) ** 0.5)
        ahead_MD = next_MD + (momentum - 1) / faster * (next_MD - v_MD)
        v_MD, momentum = next_MD, faster
    return v_MD


def by_homotopy(problem: Reconstruction, k: int, steps: int = 400) -> Tensor:
    """Follow the debiased operator from ratio 0 to 1; the result has k atoms by construction."""
    smooth = largest_eigenvalue(problem.gram)
    v_MD = problem.readout
    for step in range(1, steps):
        t_MD = descend(problem, v_MD, smooth)
        v_MD = _apply(problem, debiased, t_MD, k, homotopy(step / steps))
    return _apply(problem, hard, v_MD, k)


def by_elimination(problem: Reconstruction, k: int, damping: float = 1e-8) -> Tensor:
    """Remove one atom at a time, the one whose loss the remaining ones compensate best.

    Greedy backward elimination (optimal brain surgeon): with H the inverse Gram matrix of the
    remaining atoms and V their least-squares read-out, dropping j costs tr(v_j^T H_jj^-1 v_j) / 2
    and the others move by -H_ij H_jj^-1 v_j. O(M^3) for a layer.
    """
    elimination = Elimination(problem, damping)
    for _ in range(problem.atoms - k):
        elimination.drop(elimination.cheapest()[1])
    return elimination.v_MD


class Elimination:
    """State of a backward elimination: remaining atoms, their read-out and inverse Gram matrix.

    `damping` is in units of the scaled diagonal, which is 1 for every atom that fires.
    """

    def __init__(self, problem: Reconstruction, damping: float = 1e-8) -> None:
        gram_MM = problem.gram.clone()
        gram_MM.diagonal().add_(damping)
        self._width = problem.width
        self._inverse_MM = torch.linalg.inv(gram_MM)
        self.v_MD: Tensor = self._inverse_MM @ problem.target
        self.gone_A = torch.zeros(problem.atoms, dtype=torch.bool, device=self.v_MD.device)

    def cheapest(self) -> tuple[float, int]:
        """Return twice the error that dropping the cheapest atom adds, and its index."""
        own_ABB = diagonal_blocks(self._inverse_MM, self._width)
        v_ABD = self.v_MD.reshape(len(self.gone_A), self._width, -1)
        cost_A = (v_ABD * torch.linalg.solve(own_ABB, v_ABD)).sum((-2, -1))
        cost, place = cost_A.masked_fill(self.gone_A, torch.inf).min(0)
        return float(cost), int(place)

    def drop(self, j: int) -> None:
        """Remove one atom and let all others compensate."""
        here = slice(j * self._width, (j + 1) * self._width)
        # Removing rows and columns j from G changes its inverse by a rank-B update (block
        # elimination), so a step costs O(M^2 B) instead of a new inverse in O(M^3).
        share_MB = torch.linalg.solve(
            self._inverse_MM[here, here], self._inverse_MM[:, here], left=False
        )
        self.v_MD = self.v_MD - share_MB @ self.v_MD[here]
        self._inverse_MM = self._inverse_MM - share_MB @ self._inverse_MM[here]
        self.gone_A[j] = True
        # The rows of a dropped atom are zero up to rounding. Its diagonal block becomes the
        # identity, because `cheapest` solves with the blocks of all atoms.
        self._inverse_MM[here, :] = self._inverse_MM[:, here] = 0
        self._inverse_MM[here, here].fill_diagonal_(1)
        self.v_MD[here] = 0


def descend(problem: Reconstruction, v_MD: Tensor, smooth: float) -> Tensor:
    """Return the gradient step of length 1/L on the error."""
    step_MD: Tensor = (problem.gram @ v_MD - problem.target) / smooth
    return v_MD - step_MD


def largest_eigenvalue(gram_MM: Tensor) -> float:
    """Return the smoothness constant L of the error, by which steps are divided."""
    return float(torch.linalg.eigvalsh(gram_MM)[-1])


def _apply(
    problem: Reconstruction, operator: Callable[..., Shrinkage], t_MD: Tensor, *knobs: float
) -> Tensor:
    """Shrink or drop the atoms of a read-out by an operator on their norms."""
    return problem.scaled(t_MD, operator(problem.norms(t_MD), *knobs).scale[0])
