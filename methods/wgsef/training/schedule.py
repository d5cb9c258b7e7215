"""How learning rate, number of groups and homotopy change in the course of a run.

All are functions of progress, which goes from 0 to 1, and free of state.
"""

from __future__ import annotations

import math


def cubic(progress: float) -> float:
    """Return how much of the pruning is asked for: 1 - (1 - p)^3 (Zhu and Gupta, 2018).

    Fast while there is much to spare, slow towards the end.
    """
    return 1 - (1 - min(1.0, max(0.0, progress))) ** 3


def homotopy(progress: float) -> float:
    """Return the ratio lam d of the debiased operator, from 0, do nothing, to 1, hard selection."""
    return min(1.0, max(0.0, progress))


def learning_rate(progress: float, share: float, warmup: float = 0.05) -> float:
    """Return the factor of the learning rate.

    A linear start over `warmup` of the run, half a cosine down to 0 until the selection at
    `share`, then for the fine-tuning another one from half the rate, as after a restart: what the
    selection broke is not mended at the end of a schedule.
    """
    if progress < warmup:
        return progress / warmup
    if progress <= share:
        return _cosine((progress - warmup) / (share - warmup))
    return 0.5 * _cosine((progress - share) / (1 - share))


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))
