"""Exact choice of one option per item under a budget, by integer programming.

Shapes: I items, O options.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from bench.errors import UserError

Numbers = NDArray[np.float64]
Whole = NDArray[np.int64]


def choose(
    loss_IO: Numbers, cost_IO: Whole, budget: int, at_least: Mapping[int, int] | None = None
) -> Whole:
    """Return the option of every item, [I], of least total loss within a cost of `budget`.

    min Σ_io loss_io z_io  with  Σ_o z_io = 1,  Σ_io cost_io z_io ≤ budget,  z binary (a
    multiple-choice knapsack). `at_least` maps an option to the number of items that must take it.
    HiGHS proves optimality up to 1e-9 of the greatest loss.

    Raises:
        UserError: no choice is within the budget.
    """
    items, options = loss_IO.shape
    if not items:
        return np.zeros(0, dtype=np.int64)
    # Costs in units of their gcd: the program is the same, with coefficients small enough that the
    # solver's tolerances stay far below one unit.
    step = int(np.gcd.reduce(cost_IO, axis=None)) or 1
    # Variable i * options + o is z_io, as in a flattened [I, O] array.
    every = np.arange(items * options)
    one_each = csr_array((np.ones(every.size), (every // options, every)))
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(cost_IO.reshape(1, -1) / step, -np.inf, budget // step),
    ]
    for option, count in (at_least or {}).items():
        constraints.append(LinearConstraint((every % options == option)[None], count, np.inf))
    # HiGHS stops at an absolute gap of 1e-6; losses scaled to at most 1000 make that 1e-9 of the
    # greatest.
    scale = float(np.abs(loss_IO).max()) / 1000
    found = milp(
        c=loss_IO.flatten() / (scale or 1.0),
        integrality=np.ones(every.size),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0},
    )
    if not found.success:
        raise UserError(f"no choice of bits fits into a budget of {budget} bits: raise the budget")
    # argmax instead of a comparison with 1: the solver returns floats that are integral up to a
    # tolerance.
    return np.asarray(found.x.reshape(items, options).argmax(1), dtype=np.int64)
