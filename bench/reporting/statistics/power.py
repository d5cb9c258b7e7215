"""Power of a comparison: the smallest difference it can detect."""

from __future__ import annotations

import math

from scipy.special import ndtri

LEVEL, POWER = 0.05, 0.8


def detectable(error: float, *, level: float = LEVEL, power: float = POWER) -> float:
    """Return the smallest true difference that a two-sided test detects with this power.

    `error` is the standard error of the paired difference; the result is 2.80 errors at a level of
    5 % and a power of 80 %. For accuracies the error is √(ψ - δ²) / √N with ψ the share of samples
    on which the two models disagree, so models that agree more need fewer samples to be told apart.

    Source: Bloom, Evaluation Review 19 (1995) 547; for paired proportions, Connor, Biometrics 43
    (1987) 207.
    """
    return float(ndtri(1 - level / 2) + ndtri(power)) * error


def fewest_flips(level: float = LEVEL) -> int:
    """Return the least number of one-sided flips that the exact McNemar test can find significant.

    2 · (1/2)^k is at most the level from k = 6 on at 5 %: whatever the models, a difference below k
    / N cannot be significant on N samples.
    """
    return math.ceil(math.log2(2 / level))
