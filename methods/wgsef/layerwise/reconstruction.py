"""Reconstruction of a layer's output from few of its atoms: the quadratic problem, and selections.

Shapes: A atoms of B activations each, M = A B activations, D outputs, T tokens, K kept activations,
N atoms of all problems together.

A neuron or micro-expert is an atom of one activation, a head one of as many as its width. For atoms
of one activation, a layer outputs Y = sum_j phi_j w_j with activations phi_j (routing weight
included). In units in which every activation has root mean square 1, v_j = s_j w_j and s_j =
RMS(phi_j), the problem is

    min_V  1/(2 T) || sum_j (phi_j / s_j) v_j - Y ||_F^2   with at most k atoms

(WGSEF specification section 5, derived). It needs only the Gram matrix, so calibration text is
streamed once. ||v_j|| = RMS(phi_j) ||w_j|| is an energy in the sense of CAMERA. For wider atoms s_j
is the symmetric root of the atom's own block of the Gram matrix, which whitens its activations, and
||v_j|| is again the root mean square of the output of that atom alone.

Selections share one budget among several problems, such as the experts of a layer. Each problem has
its own Gram matrix, and atoms of different problems count as uncorrelated: the joint Gram matrix is
block-diagonal (WGSEF specification section 5: few experts fire together). The problems must share
their unit of error, so all Gram matrices are divided by one number of tokens. Selections return
masks of the atoms that stay, [A] per problem.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.wgsef.prox.operators import Shrinkage, prox_debiased, select_top_k
from methods.wgsef.solvers.schedules import homotopy_ratio


@dataclass(frozen=True)
class Reconstruction:
    """Gram matrix [M, M], its product with the true read-out [M, D], and the scales s [A, B, B].

    `readout` is the true V [M, D], in units of the outputs; all are fp64.
    """

    gram: Tensor
    target: Tensor
    readout: Tensor
    scale: Tensor

    @classmethod
    def from_gram(cls, gram_MM: Tensor, weight_MD: Tensor, width: int = 1) -> Reconstruction:
        """Return the problem of a layer with activation Gram matrix phi^T phi / T and read-out w.

        `width` is the number of activations per atom.
        """
        blocks_ABB = diagonal_blocks(gram_MM.double(), width)
        # The root of a symmetric block from its eigenvalues. Directions in which an atom was never
        # active have eigenvalues of rounding noise, of either sign: they get no energy, and scale 1
        # because the scale is inverted. For an atom of one activation that is simply a neuron that
        # never fired.
        power_AB, basis_ABB = torch.linalg.eigh(blocks_ABB)
        active_AB = power_AB > power_AB.amax(-1, keepdim=True).clamp(min=0) * 1e-12
        root_AB = torch.where(active_AB, power_AB.clamp(min=0).sqrt(), torch.ones_like(power_AB))
        scale_ABB = (basis_ABB * root_AB[:, None]) @ basis_ABB.mT
        seen_ABB = (basis_ABB * active_AB[:, None]) @ basis_ABB.mT
        # Projecting on the active directions keeps noise out of the whitened Gram matrix.
        white_ABB = torch.linalg.inv(scale_ABB) @ seen_ABB
        readout_MD = _apply_blocks(scale_ABB @ seen_ABB, weight_MD.double())
        scaled_MM = _apply_blocks(white_ABB, _apply_blocks(white_ABB, gram_MM.double()).mT)
        return cls(scaled_MM, scaled_MM @ readout_MD, readout_MD, scale_ABB)

    @property
    def atoms(self) -> int:
        """Number of atoms."""
        return len(self.scale)

    @property
    def width(self) -> int:
        """Number of activations per atom."""
        return self.scale.shape[-1]

    def norms(self, v_MD: Tensor) -> Tensor:
        """Return the norms of all atoms as a single row [1, A], as the operators take them."""
        norm_A: Tensor = v_MD.reshape(self.atoms, -1).norm(dim=-1)
        return norm_A[None]

    def scaled(self, v_MD: Tensor, factor_A: Tensor) -> Tensor:
        """Return a read-out with each atom multiplied by its factor."""
        scaled_MD: Tensor = factor_A.repeat_interleave(self.width)[:, None] * v_MD
        return scaled_MD

    def error(self, v_MD: Tensor) -> float:
        """Return || sum_j (phi_j / s_j) v_j - Y ||^2 / || Y ||^2."""
        gap_MD = v_MD - self.readout
        # tr(gap^T G gap): the squared error over all tokens without the tokens.
        wrong = (gap_MD * (self.gram @ gap_MD)).sum()
        return float(wrong / (self.readout * self.target).sum())

    def weights(self, v_MD: Tensor) -> Tensor:
        """Return v in the units of the layer's own weights, w = v / s."""
        return _apply_blocks(torch.linalg.inv(self.scale), v_MD)

    def refit(self, keep_A: Tensor, damping: float = 1e-8) -> Tensor:
        """Return the V [M, D] of least error that uses only the kept atoms.

        `damping` is relative to the mean diagonal; it decides between atoms that always fire
        together.
        """
        place_K = keep_A.repeat_interleave(self.width).nonzero()[:, 0]
        gram_KK = self.gram[place_K][:, place_K].clone()
        gram_KK.diagonal().add_(damping * gram_KK.diagonal().mean())
        v_MD = torch.zeros_like(self.readout)
        factor_KK: Tensor = torch.linalg.cholesky(gram_KK)
        v_MD[place_K] = torch.cholesky_solve(self.target[place_K], factor_KK)
        return v_MD


def diagonal_blocks(square_MM: Tensor, width: int) -> Tensor:
    """Return the diagonal blocks, one per atom, [A, B, B]."""
    atoms = len(square_MM) // width
    blocks_BBA = square_MM.reshape(atoms, width, atoms, width).diagonal(dim1=0, dim2=2)
    return blocks_BBA.movedim(-1, 0)


def _apply_blocks(blocks_ABB: Tensor, rows_MD: Tensor) -> Tensor:
    """Multiply the rows of each atom by its block."""
    atoms, width, _ = blocks_ABB.shape
    return (blocks_ABB @ rows_MD.reshape(atoms, width, -1)).reshape(rows_MD.shape)


class BackwardElimination:
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


Problems = Sequence[Reconstruction]
Selector = Callable[[Problems, int], list[Tensor]]
HOMOTOPY_STEPS = 200


def select_by_energy(problems: Problems, k: int) -> list[Tensor]:
    """Keep the k atoms of largest ||v_j||, ignoring what the others could compensate."""
    return _top_k_masks(problems, [problem.readout for problem in problems], k)


def select_by_homotopy(problems: Problems, k: int) -> list[Tensor]:
    """Follow the debiased operator from ratio 0 to 1: gradient steps per problem, one budget."""
    # One step size for all problems: norms are comparable under one budget only if all atoms moved
    # in the same metric. The largest eigenvalue of a block-diagonal matrix is that of its blocks.
    smooth = max(largest_eigenvalue(problem.gram) for problem in problems)
    readouts = [problem.readout for problem in problems]
    # The last ratio stays below 1, where the operator would divide by 0; `_top_k_masks` is its
    # limit.
    for step in range(1, HOMOTOPY_STEPS):
        moved = [gradient_step(p, v_MD, smooth) for p, v_MD in zip(problems, readouts, strict=True)]
        shrunk = prox_debiased(
            _joint_norms(problems, moved), k, homotopy_ratio(step / HOMOTOPY_STEPS)
        )
        scales = shrunk.scale[0].split([problem.atoms for problem in problems])
        parts = zip(problems, moved, scales, strict=True)
        readouts = [problem.scaled(t_MD, scale_A) for problem, t_MD, scale_A in parts]
    return _top_k_masks(problems, readouts, k)


def select_by_elimination(problems: Problems, k: int) -> list[Tensor]:
    """Remove one atom at a time, the cheapest of all problems.

    An elimination in one block leaves all others unchanged, so this is exactly the greedy
    elimination of the joint problem, at the cost of the single ones.
    """
    states = [BackwardElimination(problem) for problem in problems]
    # One entry per problem, renewed only when an atom is removed from it, is always up to date.
    heap = [(*state.cheapest(), place) for place, state in enumerate(states)]
    heapq.heapify(heap)
    for _ in range(sum(problem.atoms for problem in problems) - k):
        _, atom, place = heapq.heappop(heap)
        states[place].drop(atom)
        if not bool(states[place].gone_A.all()):
            heapq.heappush(heap, (*states[place].cheapest(), place))
    return [~state.gone_A for state in states]


def _top_k_masks(problems: Problems, readouts: Sequence[Tensor], k: int) -> list[Tensor]:
    """Return masks of the k atoms of largest norm."""
    kept_N = select_top_k(_joint_norms(problems, readouts), k).gate[0] > 0
    return list(kept_N.split([problem.atoms for problem in problems]))


def _joint_norms(problems: Problems, readouts: Sequence[Tensor]) -> Tensor:
    pairs = zip(problems, readouts, strict=True)
    return torch.cat([problem.norms(v_MD) for problem, v_MD in pairs], -1)
