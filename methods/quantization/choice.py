"""One option for every item under a budget, by an exact integer program.

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
    """Return the option of every item, [I], with the least total loss at a cost up to `budget`.

    min Σ_io loss_io z_io  with  Σ_o z_io = 1,  Σ_io cost_io z_io ≤ budget,  z binary (a
    multiple-choice knapsack). `at_least` says for an option how many items must take it. HiGHS
    proves that nothing is better by more than 1e-9 of the greatest loss.

    Raises:
        UserError: no choice is within the budget.
    """
    items, options = loss_IO.shape
    if not items:
        return np.zeros(0, dtype=np.int64)
    step = int(np.gcd.reduce(cost_IO, axis=None)) or 1
    every = np.arange(items * options)
    one_each = csr_array((np.ones(every.size), (every // options, every)))
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(cost_IO.reshape(1, -1) / step, -np.inf, budget // step),
    ]
    for option, count in (at_least or {}).items():
        constraints.append(LinearConstraint((every % options == option)[None], count, np.inf))
    # HiGHS stops at an absolute gap of 1e-6.
    scale = float(np.abs(loss_IO).max()) / 1000
    found = milp(
        c=loss_IO.flatten() / (scale or 1.0),
        integrality=np.ones(every.size),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0},
    )
    if not found.success:
        raise UserError(f"no choice of bits fits a budget of {budget} bits: raise it")
    return np.asarray(found.x.reshape(items, options).argmax(1), dtype=np.int64)
