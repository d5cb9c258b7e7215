"""The root by bracketed Newton: a few passes over the groups, all rows at once.

Shapes: L rows.

G is piecewise linear, so a Newton step that lands on the root's own piece is exact. Steps that
leave the bracket become bisections (WGSEF specification 1.1, variants iii and iv; derived).
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.wgsef.envelope.budget import Budget
from methods.wgsef.envelope.sorting import by_sorting

FIXED_PASSES = 12
_MOST_PASSES = 60
_LONG = 1 << 19
_SAMPLE = 1 << 13


def newton(budget: Budget) -> Tensor:
    """Return eta_L, iterating until every row has converged.

    Rows still open after sixty passes are solved by sorting, so the search always terminates. The
    host waits for the device after each pass; `newton_fixed` does not.
    """
    if len(budget.slope) == 1:
        return _newton_in_one_row(budget)
    search = _Search(budget)
    for _ in range(_MOST_PASSES):
        # Reading the mask synchronises with the device. Usually three to six passes suffice, so
        # this is cheaper than always running the maximum.
        if bool(search.done_L.all()):
            return search.eta_L
        search.narrow()
    return torch.where(search.done_L, search.eta_L, by_sorting(budget))


def newton_fixed(budget: Budget, passes: int = FIXED_PASSES) -> Tensor:
    """Return eta_L after a fixed number of passes, without synchronising host and device."""
    search = _Search(budget)
    for _ in range(passes):
        search.narrow()
    return search.eta_L


def _newton_in_one_row(budget: Budget) -> Tensor:
    """Return eta_L of a single row: the steps of `_Search`, decided in Python floats."""
    # The host waits for each pass anyway, and in a small network the number of torch calls is the
    # whole cost; the masked updates of `_Search` would add to it.
    if bool(budget.fits()):
        return torch.full_like(budget.budget, torch.inf)
    k, relative = float(budget.budget), _tolerance(budget.slope.dtype)
    eta, low, high = float(_start(budget)), 0.0, torch.inf
    for _ in range(_MOST_PASSES):
        eta_L = torch.tensor([eta], dtype=budget.slope.dtype, device=budget.slope.device)
        kept, rate = torch.cat(budget.evaluate(eta_L)).tolist()
        missing = k - kept
        if abs(missing) <= relative * k:
            return eta_L
        low, high = (eta, high) if missing > 0 else (low, eta)
        target = eta + missing / rate if rate > 0 else torch.inf
        # Until some eta has overshot there is no upper end: double instead of bisecting.
        middle = 2 * eta if high == torch.inf else 0.5 * (low + high)
        eta = target if low < target < high else middle
    return by_sorting(budget)


def _tolerance(dtype: torch.dtype) -> float:
    # Relative error of G at which a root counts as found: a few hundred ulps in fp64, ten in fp32,
    # about the rounding of the sum itself.
    return 1e-13 if dtype == torch.float64 else 1e-6


class _Search:
    """Bracket, multiplier and convergence of every row."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.done_L = budget.fits()
        self.eta_L = torch.where(self.done_L, torch.inf, _start(budget))
        self._low_L = torch.zeros_like(self.eta_L)
        self._high_L = torch.full_like(self.eta_L, torch.inf)

    def narrow(self) -> None:
        """Evaluate G once and move the rows that have not converged."""
        # Finished rows may hold inf, which would spread NaN; any finite value does, since it is
        # discarded.
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
        # false, so both cases fall through to the bisection.
        inside_L = (target_L > self._low_L) & (target_L < self._high_L) & target_L.isfinite()
        middle_L = 0.5 * (self._low_L + self._high_L)
        return torch.where(inside_L, target_L, torch.where(middle_L.isinf(), 2 * eta_L, middle_L))


def _start(budget: Budget) -> Tensor:
    """Return an initial multiplier: the root if all groups were fractional.

    For a long row it is the root over an even sample of its groups, which saves passes over all of
    them.
    """
    if budget.slope.shape[-1] < _LONG:
        return budget.all_fractional()
    # An even stride over a few thousand groups sees all parts of the network; a prefix would not.
    sample = budget.sample(budget.slope.shape[-1] // _SAMPLE)
    sampled_L = newton_fixed(sample)
    # All non-empty groups of the sample may fit although those of the row do not.
    return torch.where(sampled_L.isfinite(), sampled_L, budget.all_fractional())
