"""Pareto-optimal runs."""

from __future__ import annotations

import pandas as pd


def pareto(
    frame: pd.DataFrame, cost: str = "cost", value: str = "value", *, higher_is_better: bool = True
) -> pd.DataFrame:
    """Return the rows that no other row dominates, cheapest first.

    A row dominates another if it costs no more and is no worse, and is strictly better in one of
    the two. Rows equal in both do not dominate each other. Rows without a cost or a value are
    dropped. `cost` and `value` name numeric columns; a lower cost is better.
    """
    known = frame.dropna(subset=[cost, value])
    ranked = known.sort_values([cost, value], ascending=[True, not higher_is_better], kind="stable")
    # Sorted by cost and then by value, a row is on the front exactly if it is better than every row
    # before it. Rows equal in both take the verdict of the first of them: compared with each other,
    # only the first would pass.
    worth = ranked[value] if higher_is_better else -ranked[value]
    best_before = worth.cummax().shift(fill_value=-float("inf"))
    alike = [ranked[cost], ranked[value]]
    return ranked[(worth > best_before).groupby(alike).transform("first")]
