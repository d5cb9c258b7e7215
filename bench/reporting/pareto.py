"""Which runs are worth having: no other one is as good and cheaper, or better and as cheap."""

from __future__ import annotations

import pandas as pd


def pareto(
    frame: pd.DataFrame, cost: str = "cost", value: str = "value", *, higher_is_better: bool = True
) -> pd.DataFrame:
    """Return the rows that no other row dominates, cheapest first.

    A row dominates another if it costs no more and is no worse, and one of the two strictly.
    Rows that are equal in both do not dominate each other. Rows without a cost or a value are
    left out. `cost` and `value` name columns of numbers; less cost is better.
    """
    known = frame.dropna(subset=[cost, value])
    ranked = known.sort_values([cost, value], ascending=[True, not higher_is_better], kind="stable")
    worth = ranked[value] if higher_is_better else -ranked[value]
    best_before = worth.cummax().shift(fill_value=-float("inf"))
    alike = [ranked[cost], ranked[value]]
    return ranked[(worth > best_before).groupby(alike).transform("first")]
