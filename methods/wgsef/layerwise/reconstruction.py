"""Reconstruct a layer's output from few of its atoms: the quadratic problem, and selections.

Shapes: A atoms of B activations each, M = A B activations, D outputs, T tokens, K kept activations,
P penalised activations, N the other activations, or the atoms of all problems together.

An atom is a neuron or micro-expert, with one activation, or a head, with as many activations as its
width. With one activation per atom, a layer outputs Y = sum_j phi_j w_j with activations phi_j
(routing weight included). In units in which every activation has root mean square 1, with
v_j = s_j w_j and s_j = RMS(phi_j), the problem is

    min_V  1/(2 T) || sum_j (phi_j / s_j) v_j - Y ||_F^2   with at most k atoms

(WGSEF specification section 5, derived). It needs only the Gram matrix, so one pass over the
calibration text suffices. ||v_j|| = RMS(phi_j) ||w_j|| is an energy in the sense of CAMERA. For
atoms with several activations, s_j is the symmetric root of the atom's own block of the Gram
matrix, which whitens its activations, and ||v_j|| is again the root mean square of the output of
that atom alone.

A selection shares one budget among several problems, such as the experts of a layer. Each problem
has its own Gram matrix, and atoms of different problems are taken as uncorrelated, so the joint
Gram matrix is block-diagonal (WGSEF specification section 5: few experts are active on the same
token). The problems must have the same unit of error, so all Gram matrices are divided by the same
number of tokens. Selections return masks of the kept atoms, [A] per problem.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from bench.errors import UserError
from methods.wgsef.prox.operators import select_top_k
from methods.wgsef.prox.root import BudgetEquation, newton_root
from methods.wgsef.solvers.schedules import homotopy_ratio


@dataclass(frozen=True)
class Reconstruction:
    """Gram matrix [M, M] of scaled activations, original read-out V [M, D], scales [A, B, B].

    All are fp64.
    """

    gram: Tensor
    readout: Tensor
    scale: Tensor

    @cached_property
    def target(self) -> Tensor:
        """The Gram matrix times the original read-out, [M, D]; not needed by the homotopy."""
        return self.gram @ self.readout

    @classmethod
    def from_gram(cls, gram_MM: Tensor, weight_MD: Tensor, width: int = 1) -> Reconstruction:
        """Return the problem of a layer with activation Gram matrix phi^T phi / T and read-out w.

        `width` is the number of activations per atom.
        """
        blocks_ABB = diagonal_blocks(gram_MM.double(), width)
        # The root of a symmetric block is computed from its eigenvalues. Directions in which an
        # atom was never active (with one activation: a neuron that never fired) have eigenvalues of
        # rounding noise, of either sign. They get no energy, and scale 1 because the scale is
        # inverted.
        power_AB, basis_ABB = torch.linalg.eigh(blocks_ABB)
        active_AB = power_AB > power_AB.amax(-1, keepdim=True).clamp(min=0) * 1e-12
        root_AB = torch.where(active_AB, power_AB.clamp(min=0).sqrt(), torch.ones_like(power_AB))
        scale_ABB = (basis_ABB * root_AB[:, None]) @ basis_ABB.mT
        seen_ABB = (basis_ABB * active_AB[:, None]) @ basis_ABB.mT
        # Projecting onto the active directions keeps noise out of the whitened Gram matrix.
        white_ABB = torch.linalg.inv(scale_ABB) @ seen_ABB
        readout_MD = _apply_blocks(scale_ABB @ seen_ABB, weight_MD.double())
        scaled_MM = _apply_blocks(white_ABB, _apply_blocks(white_ABB, gram_MM.double()).mT)
        return cls(scaled_MM, readout_MD, scale_ABB)

    @property
    def atoms(self) -> int:
        """Number of atoms."""
        return len(self.scale)

    @property
    def width(self) -> int:
        """Number of activations per atom."""
        return self.scale.shape[-1]

    def of_unit_output(self) -> Reconstruction:
        """Return the problem of the same layer with errors relative to the energy of its output.

        This makes errors of different layers comparable, since hidden states grow with depth.
        """
        energy = (self.readout * self.target).sum()
        # A layer without output loses nothing, in any unit.
        unit = torch.where(energy > 0, energy, 1.0).rsqrt()
        return replace(self, readout=self.readout * unit)

    def norms(self, v_MD: Tensor) -> Tensor:
        """Return the norms of all atoms as a single row [1, A], the layout of the operators."""
        norm_A: Tensor = v_MD.reshape(self.atoms, -1).norm(dim=-1)
        return norm_A[None]

    def scaled(self, v_MD: Tensor, factor_A: Tensor) -> Tensor:
        """Return a read-out with each atom multiplied by its factor."""
        scaled_MD: Tensor = factor_A.repeat_interleave(self.width)[:, None] * v_MD
        return scaled_MD

    def error(self, v_MD: Tensor) -> float:
        """Return || sum_j (phi_j / s_j) v_j - Y ||^2 / || Y ||^2."""
        change_MD = v_MD - self.readout
        # tr(change^T G change) is the squared error over all tokens.
        squared_error = (change_MD * (self.gram @ change_MD)).sum()
        return float(squared_error / (self.readout * self.target).sum())

    def weights(self, v_MD: Tensor) -> Tensor:
        """Return v in the units of the layer's weights, w = v / s."""
        return _apply_blocks(torch.linalg.inv(self.scale), v_MD)

    def refit(self, keep_A: Tensor, damping: float = 1e-8) -> Tensor:
        """Return the V [M, D] of least error that uses only the kept atoms.

        `damping` is relative to the mean diagonal; it makes the solution unique for atoms that are
        always active together.
        """
        index_K = keep_A.repeat_interleave(self.width).nonzero()[:, 0]
        gram_KK = self.gram[index_K][:, index_K].clone()
        gram_KK.diagonal().add_(damping * gram_KK.diagonal().mean())
        v_MD = torch.zeros_like(self.readout)
        factor_KK: Tensor = torch.linalg.cholesky(gram_KK)
        v_MD[index_K] = torch.cholesky_solve(self.target[index_K], factor_KK)
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


def damped_inverse(gram_MM: Tensor, damping: float) -> Tensor:
    """Return the inverse of a scaled Gram matrix with a damped diagonal.

    The damping grows tenfold until the matrix is positive definite, since sums in single precision
    can turn eigenvalues of zero negative.

    Raises:
        UserError: the matrix is not finite.
    """
    while damping < 1:
        damped_MM = gram_MM.clone()
        damped_MM.diagonal().add_(damping)
        factor_MM, failed = torch.linalg.cholesky_ex(damped_MM)
        if not failed:
            inverse_MM: Tensor = torch.cholesky_inverse(factor_MM)
            return inverse_MM
        damping *= 10
    raise UserError(
        "calibration produced NaN or infinite activations: try model.dtype=float32 or a different "
        "calibration text"
    )


class BackwardElimination:
    """State of a backward elimination: remaining atoms, their read-out and inverse Gram matrix.

    `damping` is in units of the scaled diagonal, which is 1 for every active atom.
    """

    def __init__(self, problem: Reconstruction, damping: float = 1e-8) -> None:
        self._width = problem.width
        self._first_MM = damped_inverse(problem.gram, damping)
        self._own_ABB = diagonal_blocks(self._first_MM, problem.width).clone()
        # A dropped atom changes the inverse Gram matrix by a term of rank B (block elimination).
        # The terms are stored as factors, and only the columns that are needed are computed: a step
        # costs O(M B n) after n dropped activations, instead of O(M^2 B) for the whole matrix.
        self._factors_MM = torch.empty_like(self._first_MM)
        self._dropped = 0
        self.v_MD: Tensor = self._first_MM @ problem.target
        self.gone_A = torch.zeros(problem.atoms, dtype=torch.bool, device=self.v_MD.device)

    def cheapest(self) -> tuple[float, int]:
        """Return twice the error that dropping the cheapest atom adds, and its index."""
        if self._width == 1:
            cost_A = self.v_MD.square().sum(-1) / self._own_ABB[:, 0, 0]
        else:
            v_ABD = self.v_MD.reshape(len(self.gone_A), self._width, -1)
            cost_A = (v_ABD * torch.linalg.solve(self._own_ABB, v_ABD)).sum((-2, -1))
        cost, atom = cost_A.masked_fill(self.gone_A, torch.inf).min(0)
        return float(cost), int(atom)

    def drop(self, j: int) -> None:
        """Remove one atom and let all others compensate."""
        own = slice(j * self._width, (j + 1) * self._width)
        past_MN = self._factors_MM[:, : self._dropped]
        columns_MB = self._first_MM[:, own] - past_MN @ past_MN[own].T
        root_BB = torch.linalg.cholesky(columns_MB[own])
        factor_MB = torch.linalg.solve_triangular(root_BB.T, columns_MB, upper=True, left=False)
        # The rows of dropped atoms are zero by symmetry, but only up to rounding.
        factor_MB[self.gone_A.repeat_interleave(self._width)] = 0
        step_BD = torch.linalg.solve_triangular(root_BB, self.v_MD[own], upper=False)
        self.v_MD.addmm_(factor_MB, step_BD, alpha=-1)
        factor_ABB = factor_MB.reshape(len(self.gone_A), self._width, -1)
        self._own_ABB.baddbmm_(factor_ABB, factor_ABB.mT, alpha=-1)
        self._factors_MM[:, self._dropped : self._dropped + self._width] = factor_MB
        self._dropped += self._width
        self.gone_A[j] = True
        # `cheapest` solves with the blocks of all atoms, so this one must stay invertible.
        self._own_ABB[j] = torch.eye(self._width).to(self._own_ABB)
        self.v_MD[own] = 0


Problems = Sequence[Reconstruction]
Selector = Callable[[Problems, int], list[Tensor]]
HOMOTOPY_STEPS = 12
"""Strengths in the homotopy; on FFNs of SmolLM2, 24 give the same error (docs/wgsef.md)."""


def select_by_energy(problems: Problems, k: int) -> list[Tensor]:
    """Keep the k atoms of largest ||v_j||, regardless of what other atoms could compensate."""
    return _top_k_masks(problems, [problem.readout for problem in problems], k)


def select_by_homotopy(problems: Problems, k: int) -> list[Tensor]:
    """Minimise error + lam h_k by alternating minimisation while lam rises from 0 to infinity.

    h_k = F - 1/2 sum_j ||v_j||^2 = min over u in [0,1]^N, sum u <= k, of
    1/2 sum_j (1/u_j - 1) ||v_j||^2. For fixed u the problem is a ridge regression, and for fixed v
    the best u are the gates min(1, eta ||v_j||) of the envelope (`prox/operators.py`). For each
    strength lam, u and then v are minimised once, exactly. Whole atoms (u = 1) are not penalised.
    """
    states = [_PenalisedReconstruction(problem) for problem in problems]
    readouts = [problem.readout for problem in problems]
    for step in range(1, HOMOTOPY_STEPS):
        ratio = homotopy_ratio(step / HOMOTOPY_STEPS)
        gate_N = envelope_gates(_joint_norms(problems, readouts), k)[0]
        gates = gate_N.split([problem.atoms for problem in problems])
        readouts = [
            state.minimiser(gate_A, ratio / (1 - ratio))
            for state, gate_A in zip(states, gates, strict=True)
        ]
    return _top_k_masks(problems, readouts, k)


def envelope_gates(norm_LM: Tensor, k: int) -> Tensor:
    """Return u = min(1, eta ||v_j||) with sum u = k per row (all 1 if all groups fit)."""
    budget = torch.full_like(norm_LM[:, 0], float(k))
    equation = BudgetEquation(norm_LM, torch.zeros_like(norm_LM[:, :1]), budget)
    # No guard: the penalty divides by the gates.
    return equation.gates(newton_root(equation), guard=0.0)


class _PenalisedReconstruction:
    """Least-squares read-outs with a separate ridge for each atom, by block elimination."""

    def __init__(self, problem: Reconstruction, damping: float = 1e-8) -> None:
        self._readout_MD = problem.readout
        self._width = problem.width
        self._inverse_MM = damped_inverse(problem.gram, damping)
        self._rounded_MM = self._inverse_MM.float()

    def minimiser(self, gate_A: Tensor, lam: float) -> Tensor:
        """Return the V [M, D] of least error + lam/2 sum_j (1/u_j - 1) ||v_j||^2.

        Let V_0 be the original read-out, H the inverse Gram matrix, P the penalised activations
        (u < 1), N the others, E = diag(u / (lam (1 - u))) on P, and W = (H_PP + E)^-1 V_0P. Then
        V_P = E W, since H_PP W = V_0P - E W, and V_N = V_0N - H_NP W. Atoms with u = 0 are
        eliminated.
        """
        gate_M = gate_A.repeat_interleave(self._width)
        index_P = (gate_M < 1).nonzero()[:, 0]
        index_N = (gate_M >= 1).nonzero()[:, 0]
        ease_P = gate_M[index_P] / (lam * (1 - gate_M[index_P]))
        # Single precision takes half the time, but is too coarse for nearly equal activations.
        solved = _solve_blocks(self._rounded_MM, self._readout_MD, index_P, index_N, ease_P)
        if not self._is_exact(*solved, index_P, index_N, ease_P):
            solved = _solve_blocks(self._inverse_MM, self._readout_MD, index_P, index_N, ease_P)
        solved_PD, moved_ND = solved
        v_MD = torch.empty_like(self._readout_MD)
        v_MD[index_P] = ease_P[:, None] * solved_PD
        v_MD[index_N] = self._readout_MD[index_N] - moved_ND
        return v_MD

    def _is_exact(
        self,
        solved_PD: Tensor,
        moved_ND: Tensor,
        index_P: Tensor,
        index_N: Tensor,
        ease_P: Tensor,
    ) -> bool:
        """Return whether W solves its equation and `moved_ND` equals H_NP W (Freivalds' check).

        Both are tested on one random combination of the outputs, in double precision, which costs
        one matrix-vector product.
        """
        signs_D = torch.randint(
            0, 2, solved_PD.shape[1:], generator=torch.Generator().manual_seed(0)
        )
        sum_D = (2.0 * signs_D - 1).to(self._readout_MD)
        solved_M = torch.zeros_like(self._readout_MD[:, 0])
        solved_M[index_P] = solved_PD.double() @ sum_D
        moved_M = self._inverse_MM @ solved_M
        right_P = self._readout_MD[index_P] @ sum_D
        error_P = moved_M[index_P] + ease_P * solved_M[index_P] - right_P
        error_N = moved_M[index_N] - moved_ND.double() @ sum_D
        # Written so that NaN, after an overflow of single precision, counts as inexact.
        return bool(error_P.norm() + error_N.norm() <= SINGLE_PRECISION * right_P.norm())


SINGLE_PRECISION = 1e-5
"""Largest error of a solution in single precision, relative to the read-out."""


def _solve_blocks(
    inverse_MM: Tensor, readout_MD: Tensor, index_P: Tensor, index_N: Tensor, ease_P: Tensor
) -> tuple[Tensor, Tensor]:
    """Return W = (H_PP + E)^-1 V_0P and H_NP W, in the precision of the inverse."""
    rows_PM = inverse_MM[index_P]
    inner_PP = rows_PM[:, index_P]
    inner_PP.diagonal().add_(ease_P.to(inner_PP))
    # In single precision a failure need not be raised: `_is_exact` detects the wrong result.
    last_try = inner_PP.dtype == torch.float64
    factor_PP, _ = torch.linalg.cholesky_ex(inner_PP, check_errors=last_try)
    solved_PD = torch.cholesky_solve(readout_MD[index_P].to(inner_PP), factor_PP)
    return solved_PD, rows_PM[:, index_N].T @ solved_PD


def select_by_elimination(problems: Problems, k: int, floor: int = 0) -> list[Tensor]:
    """Remove one atom at a time, always the cheapest of all problems; each keeps at least `floor`.

    Removing an atom from one problem does not change the others, so this is exactly the greedy
    elimination of the joint problem, at the cost of the separate ones.
    """
    states = [BackwardElimination(problem) for problem in problems]
    # (cost, atom, problem): the cheapest atom of each problem, updated whenever an atom of that
    # problem is removed.
    heap = [
        (*state.cheapest(), index)
        for index, state in enumerate(states)
        if len(state.gone_A) > floor
    ]
    heapq.heapify(heap)
    for _ in range(sum(problem.atoms for problem in problems) - k):
        _, atom, index = heapq.heappop(heap)
        state = states[index]
        state.drop(atom)
        if int((~state.gone_A).sum()) > floor:
            heapq.heappush(heap, (*state.cheapest(), index))
    return [~state.gone_A for state in states]


def selection_flops(selector: str, activations: int, d_model: int, removed: int) -> float:
    """Return the FLOPs of one problem of M activations and its selection, for an estimate.

    M³ for the inverse in float64, which counts twice. `debiased` then takes, per strength,
    P³/3 + 2·P²·D + 2·(M − P)·P·D with P = M penalised activations, the most, in float32. `greedy`
    takes 2·M²·D for the target and M·n + 2·M·D for the n-th dropped activation, in float64.
    Others rank by the target.
    """
    m = activations
    if selector == "debiased":
        return 2 * m**3 + (HOMOTOPY_STEPS - 1) * (m**3 / 3 + 2.0 * m**2 * d_model)
    flops = 2.0 * m**2 * d_model
    if selector == "greedy":
        flops += m**3 + m * removed**2 + 2 * m * d_model * removed
    return 2 * flops


DROP_OPERATORS = 24
"""Operators for the elimination of one atom, views included."""


def _top_k_masks(problems: Problems, readouts: Sequence[Tensor], k: int) -> list[Tensor]:
    """Return masks of the k atoms of largest norm."""
    kept_N = select_top_k(_joint_norms(problems, readouts), k).gate[0] > 0
    return list(kept_N.split([problem.atoms for problem in problems]))


def _joint_norms(problems: Problems, readouts: Sequence[Tensor]) -> Tensor:
    pairs = zip(problems, readouts, strict=True)
    return torch.cat([problem.norms(v_MD) for problem, v_MD in pairs], -1)
