"""Schedules of learning rate, number of groups and homotopy.

All are pure functions of the progress of a training, 0 to 1.
"""

from __future__ import annotations

import math


def cubic_sparsity(progress: float) -> float:
    """Return the fraction of the pruning due at a progress p: 1 - (1 - p)^3 (Zhu and Gupta, 2018).

    Pruning is fast at first, when many groups are redundant, and slow towards the end.
    """
    return 1 - (1 - min(1.0, max(0.0, progress))) ** 3


def homotopy_ratio(progress: float) -> float:
    """Return the ratio lam d of the debiased operator, from 0 (identity) to 1 (hard selection)."""
    return min(1.0, max(0.0, progress))


def learning_rate_factor(progress: float, share: float, warmup: float = 0.05) -> float:
    """Return the factor of the learning rate at a progress.

    The factor rises linearly during the fraction `warmup`, falls to 0 on a half cosine until the
    selection at `share`, and restarts at one half for the fine-tuning, again on a half cosine.
    """
    if progress < warmup:
        return progress / warmup
    if progress <= share:
        return _half_cosine((progress - warmup) / (share - warmup))
    # A restart as in SGDR: with a single schedule the rate would be near 0 after the selection, too
    # low to repair its damage.
    return 0.5 * _half_cosine((progress - share) / (1 - share))


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))
