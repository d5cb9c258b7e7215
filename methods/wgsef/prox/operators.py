"""The WGSEF on group norms: its proximal operators, value, conjugate and gradient.

Shapes: L rows (layers), M groups in a row, G elements in a group; weight and metric arguments are
numbers, or tensors of [L, M] or [L, 1] in the norms' dtype.

With C_k the set of vectors with at most k non-zero groups and d_j > 0 the weights, the WGSEF is

    F = f_k**,   f_k(v) = 1/2 sum_j d_j ||v_j||^2 on C_k and +inf elsewhere.

All functions depend on the groups only through their norms. An operator returns factors: the
proximal point of t is v_j = scale_j t_j. `lam` is step size times regularisation weight; a metric
h_j replaces 1/2 ||v - t||^2 by 1/2 sum_j h_j ||v_j - t_j||^2. The formulas are in the WGSEF
specification, sections 1 to 1.3, where they are derived; arXiv 2212.12921 proves that the first
operator takes linear time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.errors import UserError
from methods.wgsef.prox.root import BudgetEquation, newton_root

RootSolver = Callable[[BudgetEquation], Tensor]
FloatOrTensor = float | Tensor


@dataclass(frozen=True)
class Shrinkage:
    """Factors of the proximal point and the gates u behind them, both [L, M].

    A gate is 1 for a group that is kept whole, 0 for a removed one, and in between for a fractional
    one, which the operator shrank as group lasso does.
    """

    scale: Tensor
    gate: Tensor

    @property
    def alive(self) -> Tensor:
        """Number of non-zero groups per row."""
        return (self.gate > 0).sum(-1)

    @property
    def fractional(self) -> Tensor:
        """Number of groups per row that are neither whole nor zero."""
        # The tolerance is that of `BudgetEquation.gates` at the lower end.
        nearly_one = 1 - (1e-9 if self.gate.dtype == torch.float64 else 1e-5)
        return ((self.gate > 0) & (self.gate < nearly_one)).sum(-1)


def prox_envelope(
    norm_LM: Tensor,
    k: FloatOrTensor,
    lam: float,
    weight: FloatOrTensor = 1.0,
    metric: FloatOrTensor = 1.0,
    *,
    cost_LM: Tensor | None = None,
    root: RootSolver = newton_root,
) -> Shrinkage:
    """Return prox_{lam F}: scale_j = u_j / (u_j + b_j) with u_j = clip(eta a_j - b_j, 0, 1).

    Here a_j = sqrt(lam d_j) ||t_j||, b_j = lam d_j / h_j, and eta is chosen so that sum_j u_j = k.
    The strongest groups only get weight decay, those in between are shrunk as by group lasso, and
    the rest are zero. With costs, k is a budget in their unit: sum_j c_j u_j = k, and a_j is
    divided by sqrt(c_j).

    Raises:
        UserError: k is 0 or less, or above the number (or the total cost) of groups; lam is not
            positive.
    """
    _refuse_impossible_arguments(norm_LM, k, lam, cost_LM)
    strength = weight * lam
    offset = strength / metric
    gate_LM = _solve_gates(_slopes(strength**0.5, norm_LM), offset, k, cost_LM, root)
    return Shrinkage(_shrink_factor(gate_LM, offset), gate_LM)


def prox_debiased(
    norm_LM: Tensor,
    k: FloatOrTensor,
    lam: float,
    weight: FloatOrTensor = 1.0,
    metric: FloatOrTensor = 1.0,
    *,
    cost_LM: Tensor | None = None,
    root: RootSolver = newton_root,
) -> Shrinkage:
    """Return prox_{lam h_k} of h_k = F - 1/2 sum_j d_j ||v_j||^2; kept groups are not shrunk.

    With r_j = lam d_j / h_j < 1, this is `prox_envelope` at t / (1 - r) in the metric h (1 - r):
    a_j = sqrt(lam d_j) ||t_j|| / (1 - r_j), b_j = r_j / (1 - r_j). As r approaches 1, the operator
    becomes hard top-k selection (specification 1.2).

    Raises:
        UserError: some r_j is 1 or more, lam is not positive, or k is impossible.
    """
    _refuse_impossible_arguments(norm_LM, k, lam, cost_LM)
    strength = weight * lam
    ratio = strength / metric
    _refuse_ratios_from_one(ratio)
    rest = 1 - ratio
    offset = ratio / rest
    gate_LM = _solve_gates(_slopes(strength**0.5 / rest, norm_LM), offset, k, cost_LM, root)
    # For a whole group, u = 1 and the factor is (1 / (1 + b)) / (1 - r) = 1 exactly, since
    # 1 + b = 1 / (1 - r). That makes the operator unbiased.
    return Shrinkage(_shrink_factor(gate_LM, offset).div_(rest), gate_LM)


def select_top_k(score_LM: Tensor, k: int) -> Shrinkage:
    """Keep the k groups of highest score, which is the limit of `prox_debiased` at ratio 1.

    Raises:
        UserError: k is not in (0, number of groups].
    """
    _refuse_impossible_arguments(score_LM, k, 1.0, None)
    kept_LM = torch.zeros_like(score_LM)
    # Unlike a threshold at the k-th score, topk returns exactly k groups even if scores are equal.
    kept_LM.scatter_(-1, score_LM.topk(k, -1).indices, 1.0)
    return Shrinkage(kept_LM, kept_LM)


def _slopes(factor: FloatOrTensor, norm_LM: Tensor) -> Tensor:
    """Return factor times norm, or just the norm if all groups have the same factor."""
    # A common factor only changes the unit of eta, so omitting it saves a pass.
    return factor * norm_LM if isinstance(factor, Tensor) else norm_LM


def _solve_gates(
    slope_LM: Tensor,
    offset: FloatOrTensor,
    k: FloatOrTensor,
    cost_LM: Tensor | None,
    root: RootSolver,
) -> Tensor:
    if cost_LM is not None:
        cost_LM = cost_LM.to(slope_LM)
        # Under sum c_j u_j = k the minimiser is u_j = clip(eta a_j / sqrt(c_j) - b_j, 0, 1)
        # (specification 1.3): an expensive group must be that much stronger to be kept.
        slope_LM = slope_LM / cost_LM.sqrt()
    k_L = torch.as_tensor(k, dtype=slope_LM.dtype, device=slope_LM.device)
    offset_LM = _as_column(offset, slope_LM)
    budget = BudgetEquation(slope_LM, offset_LM, k_L.expand(len(slope_LM)), cost_LM)
    return budget.gates(root(budget))


def _shrink_factor(gate_LM: Tensor, offset: FloatOrTensor) -> Tensor:
    """Return u / (u + b), with a single temporary tensor."""
    return (gate_LM + offset).reciprocal_().mul_(gate_LM)


def _as_column(number: FloatOrTensor, like_LM: Tensor) -> Tensor:
    """Return a number or tensor as a tensor that broadcasts over the groups of each row."""
    tensor = torch.as_tensor(number, dtype=like_LM.dtype, device=like_LM.device)
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, 1)


def _refuse_ratios_from_one(ratio: FloatOrTensor) -> None:
    # Not checked on a GPU, where reading the maximum would synchronise in each training step.
    if isinstance(ratio, Tensor) and ratio.device.type != "cpu":
        return
    largest = float(ratio.max()) if isinstance(ratio, Tensor) else ratio
    if largest >= 1:
        raise UserError(
            f"the debiased operator needs lam * weight / metric below 1, got {largest:.6g}: "
            "lower lam, or select the top k directly"
        )


def _refuse_impossible_arguments(
    norm_LM: Tensor, k: FloatOrTensor, lam: float, cost_LM: Tensor | None
) -> None:
    """Raise unless lam > 0 and 0 < k <= groups (or cost) per row; a tensor k is not checked."""
    if not lam > 0:
        raise UserError(f"lam must be above 0, got {lam:g}")
    if isinstance(k, Tensor):
        return
    most = norm_LM.shape[-1] if cost_LM is None else float(cost_LM.sum(-1).max())
    if not 0 < k <= most:
        what = "groups" if cost_LM is None else "total cost"
        raise UserError(f"k must be in (0, {most:g}] ({what}), got {k:g}")


def envelope_value(norm_LM: Tensor, weight_LM: Tensor, k_L: Tensor) -> Tensor:
    """Return F_L = 1/2 min over u in [0,1]^M, sum u <= k, of sum_j d_j ||v_j||^2 / u_j.

    The minimiser is u_j = min(1, eta z_j) with z_j = sqrt(d_j) ||v_j|| and sum u = k.
    """
    z_LM = weight_LM.sqrt() * norm_LM
    u_LM = _gates(z_LM, k_L)
    # An empty group has z = u = 0, and its term is 0 by continuity, not 0 / 0.
    return 0.5 * torch.where(z_LM > 0, z_LM.square() / u_LM, 0.0).sum(-1)


def envelope_conjugate(norm_LM: Tensor, weight_LM: Tensor, k: int) -> Tensor:
    """Return F*_L(y) = 1/2 times the sum of the k largest ||y_j||^2 / d_j."""
    return 0.5 * (norm_LM.square() / weight_LM).topk(k, -1).values.sum(-1)


def gradient_factor(norm_LM: Tensor, weight_LM: Tensor, k_L: Tensor) -> Tensor:
    """Return the factors d_j / u_j that turn v into the gradient of F; 0 for empty groups.

    At v_j = 0 the subgradients form a ball of radius sqrt(d_j) / eta, which contains zero.
    """
    u_LM = _gates(weight_LM.sqrt() * norm_LM, k_L)
    return torch.where(norm_LM > 0, weight_LM / u_LM, 0.0)


def _gates(z_LM: Tensor, k_L: Tensor) -> Tensor:
    """Return u_LM = min(1, eta z_j) with sum u = k, or 1 for all non-empty groups if they fit."""
    budget = BudgetEquation(z_LM, torch.zeros_like(z_LM[:, :1]), k_L.to(z_LM))
    # No guard: callers divide by the gates, so a small gate set to zero would give infinity.
    return budget.gates(newton_root(budget), guard=0.0)
