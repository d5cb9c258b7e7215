"""The root by sorting all breakpoints: O(M log M), exact, the oracle for the faster searches.

Shapes: L rows, M groups, P = 2 M breakpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.wgsef.envelope.budget import Budget


def by_sorting(budget: Budget) -> Tensor:
    """Return eta_L: find the linear piece of G that crosses the budget and solve it.

    Group j switches on at q_j / p_j and is whole from (1 + q_j) / p_j on (specification 1.1).
    """
    slope_LM, offset_LM = budget.slope, budget.offset.expand_as(budget.slope)
    cost_LM = torch.ones_like(slope_LM) if budget.cost is None else budget.cost
    on_LM, whole_LM = breakpoints(slope_LM, offset_LM)

    point_LP, order_LP = torch.cat([on_LM, whole_LM], -1).sort(-1)
    # Each breakpoint changes the line G = gain eta + base: switching on adds (c p, -c q), becoming
    # whole removes that again and adds c. Sorted prefix sums then give the line of each piece.
    gain_LM, base_LM = cost_LM * slope_LM, cost_LM * offset_LM
    gain_LP = torch.cat([gain_LM, -gain_LM], -1).gather(-1, order_LP).cumsum(-1)
    base_LP = torch.cat([-base_LM, base_LM + cost_LM], -1).gather(-1, order_LP).cumsum(-1)
    kept_LP = torch.where(point_LP.isfinite(), gain_LP * point_LP + base_LP, torch.inf)

    # The piece ends at the first breakpoint that reaches the budget, which exists unless all fit.
    end_L1 = (kept_LP >= budget.budget[:, None]).int().argmax(-1, keepdim=True)
    end_value_L1 = point_LP.gather(-1, end_L1)
    start_value_L1 = point_LP.gather(-1, (end_L1 - 1).clamp(min=0))
    eta_L = _solve(budget, (on_LM, whole_LM), start_value_L1, end_value_L1)
    return torch.where(budget.fits(), torch.inf, eta_L)


def breakpoints(slope_LM: Tensor, offset_LM: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each group switches on and where it is whole; infinite for empty groups."""
    live_LM = slope_LM > 0
    on_LM = torch.where(live_LM, offset_LM / slope_LM, torch.inf)
    return on_LM, torch.where(live_LM, (1 + offset_LM) / slope_LM, torch.inf)


def _solve(
    budget: Budget, points: tuple[Tensor, Tensor], start_L1: Tensor, end_L1: Tensor
) -> Tensor:
    """Return the root between two neighbouring breakpoints."""
    # Sums are computed from scratch here: prefix sums over all groups would carry their accumulated
    # rounding into the root.
    on_LM, whole_LM = points
    cost_LM = torch.ones_like(on_LM) if budget.cost is None else budget.cost
    # No breakpoint lies between start and end, so a group that switched on before and is whole
    # later is fractional on the entire piece.
    fractional_LM = ((on_LM <= start_L1) & (whole_LM > start_L1)) * cost_LM
    whole_L = ((whole_LM <= start_L1) * cost_LM).sum(-1)
    slope_L = (fractional_LM * budget.slope).sum(-1)
    offset_L = (fractional_LM * budget.offset).sum(-1)
    eta_L = (budget.budget - whole_L + offset_L) / slope_L
    return torch.where(slope_L > 0, eta_L, end_L1.squeeze(-1))
