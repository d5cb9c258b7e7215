"""Holm's step-down correction of a family of p-values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def holm(p_values: Sequence[float]) -> list[float]:
    """Return adjusted p-values in the given order; reject where they are at most the level.

    The i-th smallest of m p-values is multiplied by m - i + 1, and no adjusted value is smaller
    than the one before it. The probability of any false rejection stays below the level, whatever
    the dependence between the tests.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979) 65.
    """
    p_M = np.asarray(p_values, dtype=float)
    order_M = np.argsort(p_M, kind="stable")
    factor_M = np.arange(len(p_M), 0, -1)
    adjusted_M = np.empty_like(p_M)
    # The running maximum is the step-down rule: once a hypothesis is kept, so are all with larger
    # p-values, even where a smaller factor would make their product smaller.
    adjusted_M[order_M] = np.minimum(np.maximum.accumulate(p_M[order_M] * factor_M), 1.0)
    return [float(p) for p in adjusted_M]
