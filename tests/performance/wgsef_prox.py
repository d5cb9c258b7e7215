"""The in-place prox over one pass that reads all norms and scales all weights.

One thread, fp32 weights, unit weights d, k = m / 4, lam = 0.01; the two are timed in turn on fresh
copies of the same gaussian tensor. The pass is the best way torch has for such rows: it is what
any operator on groups must do at least.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from methods.wgsef.prox.root import BudgetEquation, newton_root, sorting_root
from tests.methods.wgsef.prox.oracles import envelope_, group_norms, scale_groups_
from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times

LAM = 0.01
GOALS = {1: 4.0, 9: 3.0, 64: 1.5, 576: 1.5}
PARAMETERS = (10**5, 10**6, 10**7)

# On a busy machine most rounds are interrupted; the least of many is one that was not.
ROUNDS = 60
LARGEST = PARAMETERS[-1]
GROUPS = 10**6
FASTER = 15.0

# The machine's noise: a quotient of quotients within it has not grown.
STEADY = 1.15


def figures() -> list[Figure]:
    """Measure all sizes; the headline is the largest tensor with groups of 64."""
    torch.set_num_threads(1)
    quotients = {(n, g): _quotient(n, g) for n in PARAMETERS for g in GOALS}
    found = [_at(quotients, LARGEST, g) for g in (64, 576, 9, 1)]
    found += [_at(quotients, n, g) for n in PARAMETERS[:-1] for g in GOALS]
    found += [_growth(quotients, g) for g in GOALS]
    return [*found, _against_sorting()]


def _at(quotients: dict[tuple[int, int], float], parameters: int, size: int) -> Figure:
    """Return one quotient; the goals are stated for the largest tensor."""
    value = quotients[parameters, size]
    judged = parameters == LARGEST
    goal = f"<= {GOALS[size]:g}" if judged else "none"
    name = f"prox / (norms + scale), {parameters:.0e} parameters in groups of {size}"
    return Figure(name, value, goal, not judged or value <= GOALS[size], "minimum, interleaved")


def _growth(quotients: dict[tuple[int, int], float], size: int) -> Figure:
    value = quotients[LARGEST, size] / quotients[LARGEST // 10, size]
    name = f"growth of that quotient from 1e6 to 1e7 parameters, groups of {size}"
    return Figure(name, value, f"<= {STEADY:g}", value <= STEADY, "linear time")


def _against_sorting() -> Figure:
    slope_LM = torch.randn(1, GROUPS, dtype=torch.float64).abs()
    offset_LM = torch.full((1, 1), LAM, dtype=torch.float64)
    budget = BudgetEquation(slope_LM, offset_LM, torch.tensor([GROUPS / 4], dtype=torch.float64))
    sorting, fast = times([lambda: sorting_root(budget), lambda: newton_root(budget)], rounds=5)
    value, median = ratio(sorting, fast)
    how = f"minimum of 5, interleaved; median {median:.1f}"
    goal = f">= {FASTER:g}"
    return Figure(
        f"root by sorting / by Newton, {GROUPS:.0e} groups", value, goal, value >= FASTER, how
    )


def _quotient(parameters: int, size: int) -> float:
    """Return the least time of the prox over the least time of the pass."""
    groups = parameters // size
    fresh_MG = torch.randn(groups, size)
    weight_MG = fresh_MG.clone()
    factor_M = torch.ones(groups, dtype=torch.float64)

    def bare() -> None:
        group_norms(weight_MG)
        scale_groups_(weight_MG, factor_M)

    acts: list[Callable[[], object]] = [bare, lambda: envelope_(weight_MG, groups // 4, LAM)]
    least = [_time(act, weight_MG, fresh_MG) for act in acts]
    for _ in range(ROUNDS):
        for place, act in enumerate(acts):
            least[place] = min(least[place], _time(act, weight_MG, fresh_MG))
    return least[1] / least[0]


def _time(act: Callable[[], object], weight_MG: Tensor, fresh_MG: Tensor) -> float:
    """Return the seconds of one act on fresh weights."""
    weight_MG.copy_(fresh_MG)
    began = time.perf_counter()
    act()
    return time.perf_counter() - began
