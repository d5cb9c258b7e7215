"""The prox of the WGSEF in a metric that varies inside a group, as Adam's does.

Shapes: M groups, G elements in a group; the metric H and t are [M, G].

For a fixed gate u the minimiser is v_i = H_i u / (H_i u + s_j) t_i with s_j = lam d_j. The gates
solve u_j(eta) = clip(root of q_j(u) = eta, 0, 1) and sum_j u_j = k, where

    q_j(u) = (sum_{i in j} H_i^2 t_i^2 s_j / (H_i u + s_j)^2)^(-1/2)

(WGSEF specification 1.3, derived; eta = mu^(-1/2)). q_j is a power mean of linear functions, hence
concave and increasing: Newton from u = 0 approaches its root from below and never passes it. If the
metric is constant in each group, q_j is linear and this is `prox.envelope`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from methods.wgsef.prox.operators import (
    FloatOrTensor,
    RootSolver,
    Shrinkage,
    _as_column,
    envelope_conjugate,
    envelope_value,
    prox_debiased,
    prox_envelope,
)
from methods.wgsef.prox.root import BudgetEquation, breakpoints, newton_root

_INNER_PASSES = 8
_OUTER_PASSES = 80


def envelope_elementwise(
    t_MG: Tensor, metric_MG: Tensor, k: int, lam: float, weight_M: Tensor
) -> Tensor:
    """Return the proximal point v [M, G] of t in the diagonal metric; k groups, lam > 0.

    Costs tens of passes over the weights; a metric that is constant in each group costs one. Meant
    for small layers and as the reference for that approximation.
    """
    strength_M1 = (lam * weight_M)[:, None]
    live_M = t_MG.abs().amax(-1) > 0
    if int(live_M.sum()) <= k:
        gate_M = live_M.to(t_MG)
    else:
        gate_M = _solve_gates(t_MG, metric_MG, strength_M1, live_M, k)
    raised_MG = metric_MG * gate_M[:, None]
    return raised_MG / (raised_MG + strength_M1) * t_MG


def inverse_root(
    t_MG: Tensor, metric_MG: Tensor, strength_M1: Tensor, gate_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Return q(u) and dq/du, both [M], at the gates u."""
    total_MG = metric_MG * gate_M[:, None] + strength_M1
    power_MG = (metric_MG * t_MG).square() * strength_M1 / total_MG.square()
    power_M = power_MG.sum(-1)
    q_M = power_M.rsqrt()
    return q_M, q_M / power_M * (power_MG * metric_MG / total_MG).sum(-1)


def gates_at(t_MG: Tensor, metric_MG: Tensor, strength_M1: Tensor, eta: Tensor) -> Tensor:
    """Return u_M = clip(q^-1(eta), 0, 1) by Newton from below."""
    gate_M = torch.zeros_like(strength_M1[:, 0])
    for _ in range(_INNER_PASSES):
        q_M, rate_M = inverse_root(t_MG, metric_MG, strength_M1, gate_M)
        # The iterate never passes the root in exact arithmetic; clamping keeps rounding from moving
        # it back.
        gate_M = (gate_M + (eta - q_M).clamp(min=0) / rate_M).clamp(max=1)
    return gate_M


def _solve_gates(
    t_MG: Tensor, metric_MG: Tensor, strength_M1: Tensor, live_M: Tensor, k: int
) -> Tensor:
    """Return the gates whose sum is k, by Newton on eta inside a bracket."""
    args = (t_MG[live_M], metric_MG[live_M], strength_M1[live_M])
    low = torch.zeros((), dtype=t_MG.dtype, device=t_MG.device)
    # q increases in u, so at the largest q(1) every live group is whole: an upper end of the
    # bracket.
    high = inverse_root(*args, torch.ones_like(args[2][:, 0]))[0].max()
    eta = 0.5 * high
    gate_M = torch.zeros_like(t_MG[:, 0])
    for _ in range(_OUTER_PASSES):
        found_M = gates_at(*args, eta)
        missing = k - found_M.sum()
        if abs(float(missing)) <= 1e-13 * k:
            break
        low, high = (eta, high) if missing > 0 else (low, eta)
        rate_M = inverse_root(*args, found_M)[1]
        # By the inverse function theorem du/deta = 1 / q'(u) for fractional groups, 0 for all
        # others.
        slope = ((found_M > 0) & (found_M < 1)).div(rate_M).sum()
        target = eta + missing / slope
        eta = target if bool((target > low) & (target < high)) else 0.5 * (low + high)
    gate_M[live_M] = torch.where(found_M < 1e-9, 0.0, found_M)
    return gate_M


_PIVOT_SAMPLES = 9


def selection_root(budget: BudgetEquation, seed: int = 0) -> Tensor:
    """Return eta_L row by row; `seed` affects the pivots and the running time, not the result."""
    generator = torch.Generator().manual_seed(seed)
    fits = budget.fits().tolist()
    roots = [
        torch.inf if fits[row] else _SelectionState(budget, row).solve(generator)
        for row in range(len(fits))
    ]
    return torch.tensor(roots, dtype=budget.slope.dtype, device=budget.slope.device)


class _SelectionState:
    """One row: the groups whose branch is undecided, and the sums over the decided ones.

    `_terms` is [5, A]: where a group switches on, where it is whole, c p, c q and c.
    """

    def __init__(self, budget: BudgetEquation, row: int) -> None:
        slope_M = budget.slope[row]
        live_M = slope_M > 0
        slope_A = slope_M[live_M]
        offset_A = budget.offset[row].expand_as(slope_M)[live_M]
        cost_A = torch.ones_like(slope_A) if budget.cost is None else budget.cost[row][live_M]
        on_A, whole_A = breakpoints(slope_A, offset_A)
        self._terms = torch.stack([on_A, whole_A, cost_A * slope_A, cost_A * offset_A, cost_A])
        self._missing = float(budget.budget[row])
        self._gain = 0.0
        self._low, self._high = 0.0, torch.inf

    def solve(self, generator: torch.Generator) -> float:
        """Halve the bracket until no breakpoint is inside; the remaining piece is linear."""
        while True:
            point_P = self._terms[:2].flatten()
            point_P = point_P[(point_P > self._low) & (point_P < self._high)]
            if len(point_P) == 0:
                break
            # The median of a few random points is close to the true median at constant cost, so
            # each pass drops a constant fraction of the breakpoints in expectation.
            drawn = torch.randint(len(point_P), (_PIVOT_SAMPLES,), generator=generator)
            self._halve(float(point_P[drawn.to(point_P.device)].median()))
            self._fold()
        return min(self._missing / self._gain, self._high) if self._gain > 0 else self._high

    def _halve(self, pivot: float) -> None:
        """Move the end of the bracket on whose side of the root the pivot lies."""
        _, _, gain_A, base_A, cost_A = self._terms
        kept_A = torch.minimum((gain_A * pivot - base_A).clamp(min=0), cost_A)
        if float(kept_A.sum()) + self._gain * pivot >= self._missing:
            self._high = pivot
        else:
            self._low = pivot

    def _fold(self) -> None:
        """Fold decided groups into the sums (whole and linear ones) or drop them (empty ones)."""
        on_A, whole_A, gain_A, base_A, cost_A = self._terms
        saturated_A = whole_A <= self._low
        linear_A = (on_A <= self._low) & (whole_A >= self._high)
        self._missing += float((base_A * linear_A).sum() - (cost_A * saturated_A).sum())
        self._gain += float((gain_A * linear_A).sum())
        self._terms = self._terms[:, ~(saturated_A | linear_A | (on_A >= self._high))]


_SHORT_ROW = 32
_BLOCK_ROWS = 1 << 13


@torch.no_grad()
def envelope_(weight_MG: Tensor, k: int, lam: float, root: RootSolver = newton_root) -> Shrinkage:
    """Replace the weight by prox_{lam F}(weight), all d_j = 1; see `prox.envelope`."""
    return _apply_(weight_MG, partial(prox_envelope, k=k, lam=lam, root=root))


@torch.no_grad()
def debiased_(weight_MG: Tensor, k: int, lam: float, root: RootSolver = newton_root) -> Shrinkage:
    """Replace the weight by prox_{lam h_k}(weight), all d_j = 1; see `prox.debiased`."""
    return _apply_(weight_MG, partial(prox_debiased, k=k, lam=lam, root=root))


def _apply_(weight_MG: Tensor, operator: Callable[[Tensor], Shrinkage]) -> Shrinkage:
    shrinkage = operator(group_norms(weight_MG)[None])
    scale_groups_(weight_MG, shrinkage.scale[0])
    return shrinkage


def group_norms(weight_MG: Tensor) -> Tensor:
    """Return the Euclidean norm of each row, [M]: fp64, or fp32 for short rows."""
    if weight_MG.shape[1] == 1:
        return weight_MG[:, 0].abs().float()
    if weight_MG.shape[1] <= _SHORT_ROW:
        return _short_norms(weight_MG)
    norm_M: Tensor = torch.linalg.vector_norm(weight_MG, dim=1, dtype=torch.float32)
    return norm_M.double()


def _short_norms(weight_MG: Tensor) -> Tensor:
    """Return the norms of rows of a few elements."""
    # torch reduces short rows slowly, one by one; a product with ones is a tuned kernel. Blocks
    # keep the squares in the cache.
    ones_G = weight_MG.new_ones(weight_MG.shape[1], dtype=torch.float32)
    parts = [torch.mv(block.float().square(), ones_G) for block in weight_MG.split(_BLOCK_ROWS)]
    return torch.cat(parts).sqrt_()


def scale_groups_(weight_MG: Tensor, scale_M: Tensor) -> None:
    """Multiply each row by its factor, in place."""
    weight_MG.mul_(scale_M.to(weight_MG.dtype)[:, None])


def keeps_exactly_k(norm_LM: Tensor, k: int, lam: float, weight: FloatOrTensor = 1.0) -> Tensor:
    """Return a mask [L] of the rows that `envelope` would leave with exactly k groups.

    With on_j = b_j / a_j and whole_j = (1 + b_j) / a_j: iff the k-th smallest `whole` is at most
    the (k+1)-th smallest `on` (specification 1.1). For unit weights that is a ratio of neighbouring
    norms of 1 + 1/lam: a small step never makes a network k-sparse at once.
    """
    offset_LM = _as_column(weight * lam, norm_LM).expand_as(norm_LM)
    slope_LM = offset_LM.sqrt() * norm_LM
    on_LM, whole_LM = offset_LM / slope_LM, (1 + offset_LM) / slope_LM
    whole_L = whole_LM.sort(-1).values[:, k - 1]
    if k == norm_LM.shape[-1]:
        return whole_L.isfinite()
    return (whole_L <= on_LM.sort(-1).values[:, k]) & whole_L.isfinite()


def value_in_closed_form(norm_LM: Tensor, weight_LM: Tensor, k: int) -> Tensor:
    """Return F_L as half the squared k-support norm of z (Argyriou, Foygel and Srebro, 2012).

    With z sorted in descending order there is one r in 0..k-1 such that the mean rule z_(k-r-1) > A
    >= z_(k-r), A = sum_{i >= k-r} z_(i) / (r + 1), holds; then F = 1/2 (sum_{i < k-r} z_(i)^2 + (r
    + 1) A^2). The oracle for `value`.
    """
    z_LM = (weight_LM.sqrt() * norm_LM).sort(-1, descending=True).values
    infinite_L1 = torch.full_like(z_LM[:, :1], torch.inf)
    above_LM = torch.cat([infinite_L1, z_LM], -1)
    values_L = torch.full_like(z_LM[:, 0], torch.nan)
    for r in range(k):
        mean_L = z_LM[:, k - r - 1 :].sum(-1) / (r + 1)
        # With ties both neighbours equal the mean, up to rounding in either direction.
        upper_L, lower_L = mean_L * (1 + 1e-12), mean_L * (1 - 1e-12)
        fits_L = (above_LM[:, k - r - 1] >= lower_L) & (upper_L >= above_LM[:, k - r])
        head_L = z_LM[:, : k - r - 1].square().sum(-1)
        candidate_L = 0.5 * (head_L + (r + 1) * mean_L.square())
        values_L = torch.where(values_L.isnan() & fits_L, candidate_L, values_L)
    return values_L


def sparsity_excess(norm_LM: Tensor, weight_LM: Tensor, k_L: Tensor) -> Tensor:
    """Return h_k = F - 1/2 sum_j d_j ||v_j||^2 [L]: zero exactly if at most k groups are alive.

    A continuous measure of how far a row is from having k groups (specification 1.2).
    """
    ridge_L = 0.5 * (weight_LM * norm_LM.square()).sum(-1)
    return envelope_value(norm_LM, weight_LM, k_L) - ridge_L


def fenchel_young_gap(v_LMG: Tensor, y_LMG: Tensor, weight_LM: Tensor, k: int) -> Tensor:
    """Return F(v) + F*(y) - <v, y> [L]: never negative, zero iff y is a subgradient of F at v.

    With y = (t - v) / lam it certifies that v is the proximal point of t. G elements per group.
    """
    k_L = torch.full_like(v_LMG[:, 0, 0], k)
    primal_L = envelope_value(v_LMG.norm(dim=-1), weight_LM, k_L)
    dual_L = envelope_conjugate(y_LMG.norm(dim=-1), weight_LM, k)
    return primal_L + dual_L - (v_LMG * y_LMG).sum((-1, -2))
