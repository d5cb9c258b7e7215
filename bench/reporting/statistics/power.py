"""What a comparison could have seen at all."""

from __future__ import annotations

import math

from scipy.special import ndtri

LEVEL, POWER = 0.05, 0.8


def detectable(error: float, *, level: float = LEVEL, power: float = POWER) -> float:
    """Return the least true difference that a two-sided test finds with this power.

    `error` is the standard error of the paired difference: 2.80 errors at 5 % and 80 %. For
    accuracies it is √(ψ - δ²) / √N with ψ the share of samples on which the two disagree, so
    models that agree more are told apart with fewer samples.

    Source: Bloom, Evaluation Review 19 (1995) 547; for paired proportions, Connor, Biometrics 43
    (1987) 207.
    """
    return float(ndtri(1 - level / 2) + ndtri(power)) * error


def fewest_flips(level: float = LEVEL) -> int:
    """Return how few samples may differ, all in one direction, for the exact McNemar test.

    2 · (1/2)^k is at most the level from k = 6 on at 5 %: whatever the models, a difference
    under k / N cannot be significant on N samples.
    """
    return math.ceil(math.log2(2 / level))
