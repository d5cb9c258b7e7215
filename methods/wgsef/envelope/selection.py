"""The root by randomised selection among the breakpoints: expected linear time.

Shapes: A groups still undecided in the current row, P their breakpoints inside the bracket.

This is the linear-time algorithm of arXiv 2212.12921 (abstract): a pivot halves the breakpoints
that can still be next to the root, and groups that can no longer change their branch are folded
into three running sums, so the work is a geometric series (specification 1.1, variant ii; derived).
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.wgsef.envelope.budget import Budget
from methods.wgsef.envelope.sorting import breakpoints

_DRAWN = 9


def by_selection(budget: Budget, seed: int = 0) -> Tensor:
    """Return eta_L row by row; `seed` affects the pivots and the running time, not the result."""
    generator = torch.Generator().manual_seed(seed)
    fits = budget.fits().tolist()
    roots = [
        torch.inf if fits[row] else _Undecided(budget, row).solve(generator)
        for row in range(len(fits))
    ]
    return torch.tensor(roots, dtype=budget.slope.dtype, device=budget.slope.device)


class _Undecided:
    """One row: the groups whose branch is undecided, and the sums over the decided ones.

    `_terms` is [5, A]: where a group switches on, where it is whole, c p, c q and c.
    """

    def __init__(self, budget: Budget, row: int) -> None:
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
            drawn = torch.randint(len(point_P), (_DRAWN,), generator=generator)
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
