"""Schedules of learning rate, number of groups and homotopy.

All are pure functions of the progress of a training, 0 to 1.
"""

from __future__ import annotations

import math


def cubic_sparsity(progress: float) -> float:
    """Return the fraction of the pruning due by now: 1 - (1 - p)^3 (Zhu and Gupta, 2018).

    Fast at first, when many groups are redundant, slow towards the end.
    """
    return 1 - (1 - min(1.0, max(0.0, progress))) ** 3


def homotopy_ratio(progress: float) -> float:
    """Return the ratio lam d of the debiased operator, from 0 (identity) to 1 (hard selection)."""
    return min(1.0, max(0.0, progress))


def learning_rate_factor(progress: float, share: float, warmup: float = 0.05) -> float:
    """Return the factor of the learning rate.

    Linear warm-up over `warmup` of the training, then half a cosine to 0 at the selection
    (`share`), then another half cosine from half the rate for the fine-tuning.
    """
    if progress < warmup:
        return progress / warmup
    if progress <= share:
        return _half_cosine((progress - warmup) / (share - warmup))
    # A restart as in SGDR: at the rate near 0 of a single schedule's end, the damage done by the
    # selection could not be repaired.
    return 0.5 * _half_cosine((progress - share) / (1 - share))


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))
