"""Scalar equation behind the envelope and its operators, and its root.

Shapes: L rows (layers, or one row for a whole network), M groups in a row, 1 if a value is shared
by all groups, P = 2 M breakpoints.

Each row has one unknown, the multiplier eta > 0 (dimensionless):

    G(eta) = sum_j c_j clip(eta p_j - q_j, 0, 1) = k

with slopes p_j >= 0, offsets q_j >= 0, costs c_j > 0 and the budget k > 0. The value, the proximal
operator, the debiased operator and the cost budget of the WGSEF (arXiv 2212.12921) differ only in p
and q (derived; checked against certificates in the tests). G is piecewise linear and
non-decreasing. A group of slope zero is never kept, so ragged rows can be padded with zeros. If all
non-empty groups fit into the budget, the root is infinite and each of them is kept whole.

The root is found by a bracketed Newton iteration in a few passes over the groups, for all rows at
once: a step from the linear piece that contains the root is exact, and steps that leave the bracket
are replaced by bisections (WGSEF specification 1.1, variants iii and iv; derived). The fallback
sorts all breakpoints, which is exact and takes O(M log M).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 15


@dataclass(frozen=True)
class BudgetEquation:
    """One equation per row: slopes p [L, M], offsets q [L, M or 1], budget k [L], costs c [L, M].

    All have one floating dtype, fp64 or fp32; `cost` None counts every group as one.
    """

    slope: Tensor
    offset: Tensor
    budget: Tensor
    cost: Tensor | None = None

    def gates(self, eta_L: Tensor, guard: float | None = None) -> Tensor:
        """Return u_LM = clip(eta p - q, 0, 1), with values up to `guard` min(1, q) set to 0.

        The default of `guard` is 1e-9 in fp64 and 1e-5 in fp32.
        """
        # At a root on the edge of a flat piece of G, a group that must be zero has eta p = q. The
        # difference of these equal numbers is rounding noise of about 1e-16 q in fp64 and 1e-7 q in
        # fp32, which must be removed, since u > 0 counts as an alive group. The threshold is
        # relative to q, because with a tiny lam d even a gate far below 1e-5 can belong to a group
        # that is hardly shrunk. It is capped at q = 1, because near its end the debiased operator
        # has q above 1e9 while gates stay below 1.
        if guard is None:
            guard = 1e-9 if self.slope.dtype == torch.float64 else 1e-5
        # An infinite multiplier would turn empty groups into NaN (inf * 0). The largest finite
        # number gives 0 for these, and makes all others whole.
        eta_L1 = eta_L.clamp(max=torch.finfo(eta_L.dtype).max)[:, None]
        gate_LM = torch.empty_like(self.slope)
        start = 0
        for part in self._blocks():
            stop = start + part.slope.shape[-1]
            out = gate_LM[:, start:stop]
            torch.mul(part.slope, eta_L1, out=out)
            out.sub_(part.offset)
            if guard and self._scalar_offset:
                floor = guard * min(1.0, float(part.offset))
                out.clamp_(0, 1)
                torch.threshold_(out, floor, 0.0)
            else:
                if guard:
                    out.masked_fill_(out <= guard * part.offset.clamp(max=1), 0.0)
                out.clamp_(0, 1)
            start = stop
        return gate_LM

    def fits(self) -> Tensor:
        """Return a mask [L] of the rows in which all non-empty groups fit into the budget."""
        # Slopes are not negative, so the sum of their signs counts the non-empty groups.
        live = [part._weighted(part.slope.sign()).sum(-1) for part in self._blocks()]
        return torch.stack(live).sum(0, dtype=torch.float64) <= self.budget

    def all_fractional(self) -> Tensor:
        """Return the root [L], valid for rows in which no group is empty and none is whole."""
        if self.cost is None and self._shared_offset:
            # A shared offset needs no [L, M] temporary.
            offset_L = self.offset[:, 0] * self.slope.shape[-1]
            return (self.budget + offset_L) / self.slope.sum(-1)
        slope_L = self._weighted(self.slope).sum(-1)
        offset_L = self._weighted(self.offset.expand_as(self.slope)).sum(-1)
        return (self.budget + offset_L) / slope_L

    def evaluate(self, eta_L: Tensor) -> tuple[Tensor, Tensor]:
        """Return G(eta) and its slope dG/deta, both [L]."""
        parts = [part._evaluate(eta_L) for part in self._blocks()]
        if len(parts) == 1:
            return parts[0]
        kept, rate = zip(*parts, strict=True)
        # Above 2^24 an fp32 sum cannot count single groups, so partial sums are added in fp64.
        kept_L = torch.stack(kept).sum(0, dtype=torch.float64).to(eta_L)
        return kept_L, torch.stack(rate).sum(0)

    def sample(self, stride: int) -> BudgetEquation:
        """Return the equation over every `stride`-th group with the same fraction of the budget."""
        return BudgetEquation(
            self.slope[:, ::stride].contiguous(),
            self.offset if self._shared_offset else self.offset[:, ::stride].contiguous(),
            self.budget / stride,
            None if self.cost is None else self.cost[:, ::stride].contiguous(),
        )

    @property
    def _shared_offset(self) -> bool:
        return self.offset.shape[-1] == 1

    @property
    def _scalar_offset(self) -> bool:
        """Whether all groups share an offset that is on the CPU, where reading it is free."""
        return self.offset.numel() == 1 and self.offset.device.type == "cpu"

    def _evaluate(self, eta_L: Tensor) -> tuple[Tensor, Tensor]:
        one_row = self.cost is None and self._scalar_offset and len(self.slope) == 1
        # `_evaluate_row` divides by eta, which is 0 if the sum of the slopes overflowed.
        if one_row and float(eta_L) > 0:
            return self._evaluate_row(float(eta_L))
        raised_LM = (self.slope * eta_L[:, None]).sub_(self.offset)
        gate_LM = raised_LM.clamp(0, 1)
        # A group is fractional exactly if clipping left its value unchanged. The comparison in
        # place reuses the buffer; two comparisons would need three more temporaries of [L, M].
        fractional_LM = raised_LM.eq_(gate_LM)
        rate_L = fractional_LM.mul_(self._weighted(self.slope)).sum(-1)
        return self._weighted(gate_LM).sum(-1), rate_L

    def _evaluate_row(self, eta: float) -> tuple[Tensor, Tensor]:
        """Return the same for a single row with a shared offset, with one temporary of [1, M]."""
        # clip(eta p - q, 0, 1) = eta (clip(p, low, high) - low) with these bounds of p. The other
        # passes are comparisons, which write only bytes.
        low, high = float(self.offset) / eta, (1 + float(self.offset)) / eta
        sum_L = self.slope.clamp(low, high).sub_(low).sum(-1)
        whole_L = (self.slope >= high).sum(-1, dtype=sum_L.dtype)
        fractional_L = (self.slope > low).sum(-1, dtype=sum_L.dtype) - whole_L
        rate_L = sum_L - whole_L * (high - low) + fractional_L * low
        return eta * sum_L, rate_L.clamp(min=0)

    def _blocks(self) -> list[BudgetEquation]:
        """Return the equation in blocks of columns whose temporaries fit into a CPU's cache."""
        # On a GPU blocks would only add kernel launches.
        rows, groups = self.slope.shape
        if self.slope.device.type != "cpu" or rows * groups <= _BLOCK_ELEMENTS:
            return [self]
        width = max(1, _BLOCK_ELEMENTS // rows)
        return [self._columns(start, start + width) for start in range(0, groups, width)]

    def _columns(self, start: int, stop: int) -> BudgetEquation:
        return BudgetEquation(
            self.slope[:, start:stop],
            self.offset if self._shared_offset else self.offset[:, start:stop],
            self.budget,
            None if self.cost is None else self.cost[:, start:stop],
        )

    def _weighted(self, amount_LM: Tensor) -> Tensor:
        return amount_LM if self.cost is None else amount_LM * self.cost


FIXED_PASSES = 12
_MAX_PASSES = 60
_LONG_ROW = 1 << 19
_SAMPLE_SIZE = 1 << 13


def newton_root(budget: BudgetEquation) -> Tensor:
    """Return eta_L, iterating until every row has converged.

    Rows that have not converged after `_MAX_PASSES` are solved by sorting, so the search always
    terminates. The host waits for the device after each pass, unlike in
    `newton_root_fixed_passes`.
    """
    if len(budget.slope) == 1:
        return _newton_single_row(budget)
    search = _BracketedNewton(budget)
    for _ in range(_MAX_PASSES):
        # Reading the mask synchronises with the device. That is cheaper than always running all
        # passes, since three to six usually suffice.
        if bool(search.done_L.all()):
            return search.eta_L
        search.narrow()
    return torch.where(search.done_L, search.eta_L, sorting_root(budget))


def newton_root_fixed_passes(budget: BudgetEquation, passes: int = FIXED_PASSES) -> Tensor:
    """Return eta_L after a fixed number of passes, without synchronising host and device.

    The result is the root for rows that have converged and close to it for others; on 12 of 1,700
    hard rows twelve passes were too few. Use it as a starting point, or where that does no harm.
    """
    search = _BracketedNewton(budget)
    for _ in range(passes):
        search.narrow()
    return search.eta_L


# A multiplier that is far too large overflows, and is halved in the next pass. Sums that underflow
# to 0 give an infinite one, which no pass improves; then the row is sorted.
@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def _newton_single_row(budget: BudgetEquation) -> Tensor:
    """Return eta_L of a single row: the steps of `_BracketedNewton`, decided in Python floats."""
    # The host waits for each pass anyway. In a small network the cost is the number of calls, to
    # which the masked updates of `_BracketedNewton` would add.
    small = budget.slope.device.type == "cpu" and budget.slope.numel() <= _BLOCK_ELEMENTS
    row = _NumpyRow(budget) if small else _TorchRow(budget)
    if row.fits():
        return torch.full_like(budget.budget, torch.inf)
    k, relative = float(budget.budget), _tolerance(budget.slope.dtype)
    eta, low, high = row.initial_multiplier(), 0.0, math.inf
    for _ in range(_MAX_PASSES):
        kept, rate = row.evaluate(eta)
        missing = k - kept
        if abs(missing) <= relative * k:
            return torch.full_like(budget.budget, eta)
        low, high = (eta, high) if missing > 0 else (low, eta)
        target = eta + missing / rate if rate > 0 else math.inf
        # There is no upper bound before some eta has overshot: double instead of bisecting.
        middle = 2 * eta if high == math.inf else 0.5 * (low + high)
        eta = target if low < target < high else middle
    return sorting_root(budget)


class _TorchRow:
    """A single row of any length on any device."""

    def __init__(self, budget: BudgetEquation) -> None:
        self._budget = budget

    def fits(self) -> bool:
        return bool(self._budget.fits())

    def initial_multiplier(self) -> float:
        return float(_initial_multiplier(self._budget))

    def evaluate(self, eta: float) -> tuple[float, float]:
        """Return G(eta) and its slope."""
        kept, rate = torch.cat(self._budget.evaluate(self._budget.slope.new_tensor([eta]))).tolist()
        return kept, rate


class _NumpyRow:
    """A short row on the CPU; a call of NumPy costs a fraction of one of torch."""

    def __init__(self, budget: BudgetEquation) -> None:
        self._slope_M = budget.slope[0].detach().numpy()
        self._offset_M = budget.offset[0].detach().numpy()
        self._cost_M = None if budget.cost is None else budget.cost[0].numpy()
        self._gain_M = self._weighted(self._slope_M)
        self._budget = float(budget.budget)

    def fits(self) -> bool:
        return float(self._weighted(self._slope_M > 0).sum()) <= self._budget

    def initial_multiplier(self) -> float:
        """Return the root as if all groups were fractional."""
        offset_M = self._weighted(self._offset_M)
        # A shared offset has one element.
        offset = float(offset_M.sum()) * (self._slope_M.size / offset_M.size)
        return float((self._budget + offset) / self._gain_M.sum(dtype=np.float64))

    def evaluate(self, eta: float) -> tuple[float, float]:
        """Return G(eta) and its slope."""
        raised_M = self._slope_M * eta - self._offset_M
        gate_M = raised_M.clip(0, 1)
        # A group is fractional exactly if clipping left its value unchanged.
        rate = np.dot(raised_M == gate_M, self._gain_M)
        return float(self._weighted(gate_M).sum()), float(rate)

    def _weighted(self, amount_M: NDArray[Any]) -> NDArray[Any]:
        return amount_M if self._cost_M is None else amount_M * self._cost_M


def _tolerance(dtype: torch.dtype) -> float:
    # Relative error of G at which a root counts as found: a few hundred ulps in fp64, ten in fp32,
    # about the rounding error of the sum itself.
    return 1e-13 if dtype == torch.float64 else 1e-6


class _BracketedNewton:
    """Bracket, multiplier and convergence of every row."""

    def __init__(self, budget: BudgetEquation) -> None:
        self._budget = budget
        self.done_L = budget.fits()
        self.eta_L = torch.where(self.done_L, torch.inf, _initial_multiplier(budget))
        self._low_L = torch.zeros_like(self.eta_L)
        self._high_L = torch.full_like(self.eta_L, torch.inf)

    def narrow(self) -> None:
        """Evaluate G once and move the rows that have not converged."""
        # Rows that have converged may hold inf, which would give NaN. Their values are discarded
        # below, so any finite number will do.
        eta_L = self.eta_L.where(~self.done_L, 1.0)
        kept_L, rate_L = self._budget.evaluate(eta_L)
        missing_L = self._budget.budget - kept_L
        allowed_L = _tolerance(eta_L.dtype) * self._budget.budget
        self.done_L = self.done_L | (missing_L.abs() <= allowed_L)
        self._low_L = torch.where(missing_L > 0, eta_L, self._low_L)
        self._high_L = torch.where(missing_L < 0, eta_L, self._high_L)
        self.eta_L = torch.where(self.done_L, self.eta_L, self._next(eta_L, missing_L / rate_L))

    def _next(self, eta_L: Tensor, step_L: Tensor) -> Tensor:
        """Return eta plus the Newton step, or a bisection if that leaves the bracket."""
        target_L = eta_L + step_L
        # On a flat piece the rate is 0 and the step infinite or NaN. Comparisons with NaN are
        # false, so both cases end in the bisection.
        inside_L = (target_L > self._low_L) & (target_L < self._high_L) & target_L.isfinite()
        middle_L = 0.5 * (self._low_L + self._high_L)
        return torch.where(inside_L, target_L, torch.where(middle_L.isinf(), 2 * eta_L, middle_L))


def _initial_multiplier(budget: BudgetEquation) -> Tensor:
    """Return an initial multiplier: the root as if all groups were fractional.

    For a long row it is the root over an even sample of the groups, which saves passes over all of
    them.
    """
    if budget.slope.shape[-1] < _LONG_ROW:
        return budget.all_fractional()
    # Unlike a prefix, an even stride covers all parts of the network.
    sample = budget.sample(budget.slope.shape[-1] // _SAMPLE_SIZE)
    sampled_L = newton_root_fixed_passes(sample)
    # The non-empty groups of the sample may all fit (an infinite root) although those of the row do
    # not.
    return torch.where(sampled_L.isfinite(), sampled_L, budget.all_fractional())


def sorting_root(budget: BudgetEquation) -> Tensor:
    """Return eta_L: find the linear piece of G that crosses the budget and solve it.

    The gate of group j becomes positive at q_j / p_j and 1 at (1 + q_j) / p_j (specification 1.1).
    """
    slope_LM, offset_LM = budget.slope, budget.offset.expand_as(budget.slope)
    cost_LM = torch.ones_like(slope_LM) if budget.cost is None else budget.cost
    on_LM, whole_LM = breakpoints(slope_LM, offset_LM)

    point_LP, order_LP = torch.cat([on_LM, whole_LM], -1).sort(-1)
    # Each breakpoint changes the line G = gain eta + base: a group that becomes positive adds (c p,
    # -c q), and one that becomes whole removes that again and adds (0, c). Prefix sums in sorted
    # order give the line of each piece.
    gain_LM, base_LM = cost_LM * slope_LM, cost_LM * offset_LM
    gain_LP = torch.cat([gain_LM, -gain_LM], -1).gather(-1, order_LP).cumsum(-1)
    base_LP = torch.cat([-base_LM, base_LM + cost_LM], -1).gather(-1, order_LP).cumsum(-1)
    kept_LP = torch.where(point_LP.isfinite(), gain_LP * point_LP + base_LP, torch.inf)

    # The piece ends at the first breakpoint that reaches the budget. There is one unless all groups
    # fit, a case replaced below.
    end_L1 = (kept_LP >= budget.budget[:, None]).int().argmax(-1, keepdim=True)
    end_value_L1 = point_LP.gather(-1, end_L1)
    start_value_L1 = point_LP.gather(-1, (end_L1 - 1).clamp(min=0))
    eta_L = _solve_piece(budget, (on_LM, whole_LM), start_value_L1, end_value_L1)
    return torch.where(budget.fits(), torch.inf, eta_L)


def breakpoints(slope_LM: Tensor, offset_LM: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eta at which each gate becomes positive and 1; infinite for empty groups."""
    live_LM = slope_LM > 0
    on_LM = torch.where(live_LM, offset_LM / slope_LM, torch.inf)
    return on_LM, torch.where(live_LM, (1 + offset_LM) / slope_LM, torch.inf)


def _solve_piece(
    budget: BudgetEquation, points: tuple[Tensor, Tensor], start_L1: Tensor, end_L1: Tensor
) -> Tensor:
    """Return the root between two neighbouring breakpoints."""
    # Computed from scratch, because prefix sums over all groups accumulate rounding errors.
    on_LM, whole_LM = points
    cost_LM = torch.ones_like(on_LM) if budget.cost is None else budget.cost
    # No breakpoint lies between start and end, so a group that is positive at the start and whole
    # only later is fractional on the entire piece.
    fractional_LM = ((on_LM <= start_L1) & (whole_LM > start_L1)) * cost_LM
    whole_L = ((whole_LM <= start_L1) * cost_LM).sum(-1)
    slope_L = (fractional_LM * budget.slope).sum(-1)
    offset_L = (fractional_LM * budget.offset).sum(-1)
    eta_L = (budget.budget - whole_L + offset_L) / slope_L
    return torch.where(slope_L > 0, eta_L, end_L1.squeeze(-1))
