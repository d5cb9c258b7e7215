"""Statistics of paired comparisons as pure functions: Holm, bootstrap, McNemar, power.

The bootstrap resamples means, because every metric compared here is a function of means.

Shapes: M tests, N samples, C columns of scores, R resamples, K distinct rows, B resamples in a
block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, ndtri
from scipy.stats import binom

Floats = NDArray[np.float64]
CONFIDENCE = 0.95
LEVEL, POWER = 0.05, 0.8
RESAMPLES = 10_000
DRAWS_PER_BLOCK = 1 << 17
"""Draws per block: 1 MiB of draws and 1 MiB of counts, which fit into the CPU cache."""
MULTINOMIAL_COST = 32
"""A binomial draw takes as long as drawing and counting about 32 uniform numbers."""


def holm(p_values: Sequence[float]) -> list[float]:
    """Return adjusted p-values in the given order; reject those that are at most the level.

    The i-th smallest of m p-values is multiplied by m - i + 1, and no adjusted value is smaller
    than the previous one. The probability of any false rejection is below the level, whatever the
    dependence between the tests.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979) 65.
    """
    p_M = np.asarray(p_values, dtype=float)
    order_M = np.argsort(p_M, kind="stable")
    factor_M = np.arange(len(p_M), 0, -1)
    adjusted_M = np.empty_like(p_M)
    # The running maximum is the step-down rule: if a hypothesis is not rejected, neither are those
    # with larger p-values, even if a smaller factor makes their product smaller.
    adjusted_M[order_M] = np.minimum(np.maximum.accumulate(p_M[order_M] * factor_M), 1.0)
    return [float(p) for p in adjusted_M]


EXACT_PAIRS = 16
"""Maximum number of pairs for which all sign flips are counted; for more pairs they are sampled."""


def sign_flip_p(difference_S: Floats) -> float:
    """Return the two-sided p-value of paired differences [S] for a mean of 0.

    Under the null hypothesis both members of a pair have the same distribution, so each difference
    has either sign equally often: p is the share of the 2^S assignments of signs whose mean is at
    least as far from 0 as the observed one. It is at least 2 / 2^S, so five pairs cannot reach 5 %.

    Source: Fisher, The Design of Experiments (1935), section 21.
    """
    pairs = len(difference_S)
    if pairs <= EXACT_PAIRS:
        bit_NS = np.arange(2**pairs)[:, None] >> np.arange(pairs) & 1
    else:
        bit_NS = np.random.default_rng(0).integers(0, 2, (2**EXACT_PAIRS, pairs))
    total_N = np.abs((1 - 2 * bit_NS) @ difference_S)
    seen = abs(float(difference_S.sum()))
    # Rounding must not decide whether an assignment is as extreme as the observed one.
    return float((total_N >= seen * (1 - 1e-12)).mean())


def percentile_interval(draw_R: Floats, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the bootstrap interval with equal tails.

    Source: Efron and Tibshirani (1993), chapter 13. It is invariant under monotone functions of the
    statistic, and too narrow by about 1/(2N) for N samples.
    """
    tail = (1 - confidence) / 2
    low, high = np.quantile(draw_R, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_p(draw_R: Floats, hypothesis: float = 0.0) -> float:
    """Return the two-sided p-value: the level at which the percentile interval ends at a value.

    It is twice the smaller tail beyond the hypothesis. One draw is added to each count so that no
    p-value is zero: the smallest one with 10,000 resamples is 0.0002.

    Source: Efron and Tibshirani (1993), section 15.4; the added draw as in Davison and Hinkley,
    Bootstrap Methods and their Application (1997), section 4.2.
    """
    # Draws equal to the hypothesis count in both tails: ties are common because accuracies are
    # discrete, and this makes the p-value larger rather than smaller.
    below = int((draw_R <= hypothesis).sum())
    above = int((draw_R >= hypothesis).sum())
    return min(1.0, 2 * (1 + min(below, above)) / (1 + len(draw_R)))


def least_p(units: int) -> float:
    """Return the smallest two-sided p-value of an exact paired test: all differences of one sign.

    It is that of a sign-flip test over `units` pairs (Fisher, The Design of Experiments, 1935,
    section 21). The bootstrap of a few units can give a much smaller one, because every resample of
    differences of one sign has that sign.
    """
    return float(min(1.0, 2.0 ** (1 - units)))


class McNemar(NamedTuple):
    """Two-sided p-values: exact (never exceeds its nominal error rate) and mid-p.

    The mid-p counts the observed outcome half. It is less conservative if few samples differ, but
    can exceed its nominal level, though rarely and slightly.
    """

    exact: float
    mid: float


def mcnemar(gained: int, lost: int) -> McNemar:
    """Test `gained` against `lost`, the numbers of samples on which two models disagree.

    Under the null hypothesis each of these samples is a fair coin flip: gained ~ Binomial(gained +
    lost, 1/2). Samples on which both models are right or both are wrong carry no information about
    the difference.

    Source: McNemar, Psychometrika 12 (1947) 153; exact and mid-p forms as in Fagerland, Lydersen
    and Laake, BMC Medical Research Methodology 13 (2013) 91.
    """
    flips, fewer = gained + lost, min(gained, lost)
    if flips == 0:
        return McNemar(1.0, 1.0)
    point = float(binom.pmf(fewer, flips, 0.5))
    if gained == lost:
        # Doubling the tail would count the central outcome twice and exceed 1.
        return McNemar(1.0, 1.0 - point / 2)
    # bdtr is the binomial distribution function, without the overhead of scipy.stats objects.
    exact = 2 * float(bdtr(fewer, flips, 0.5))
    return McNemar(exact, exact - point)


def detectable_difference(error: float, *, level: float = LEVEL, power: float = POWER) -> float:
    """Return the smallest true difference that a two-sided test detects with this power.

    `error` is the standard error of the paired difference; the result is 2.80 errors at a level of
    5 % and a power of 80 %. For accuracies the error is √(ψ - δ²) / √N, where ψ is the share of
    samples on which the two models disagree, so models that agree more need fewer samples.

    Source: Bloom, Evaluation Review 19 (1995) 547; for paired proportions, Connor, Biometrics 43
    (1987) 207.
    """
    return float(ndtri(1 - level / 2) + ndtri(power)) * error


def min_significant_flips(level: float = LEVEL) -> int:
    """Return the smallest number of one-sided flips that is significant in the exact McNemar test.

    2 · (1/2)^k is at most the level from k = 6 on at 5 %, so a difference below k / N cannot be
    significant with N samples, whatever the models.
    """
    return math.ceil(math.log2(2 / level))


def resampled_means(
    score_NC: Floats, generator: np.random.Generator, resamples: int = RESAMPLES
) -> Floats:
    """Return column means [R, C] of R resamples of N rows, drawn with replacement.

    A row is one sample; its columns (the score of each run on it) stay together, which makes the
    bootstrap paired.

    The number of times each row is drawn is multinomial, and a mean depends only on these counts:
    counts @ scores / N. Equal rows are counted together. Accuracies of two runs have at most four
    distinct rows, so their counts are drawn directly; if most rows differ, uniform draws are
    counted in blocks instead, which gives the same distribution.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 8.
    """
    row_KC, times_K = np.unique(score_NC, axis=0, return_counts=True)
    # A multinomial draw costs K binomial draws per resample, counting costs N uniform ones.
    draw = (
        _multinomial_counts if len(row_KC) * MULTINOMIAL_COST < len(score_NC) else _uniform_counts
    )
    blocks = [count_BK @ row_KC for count_BK in draw(times_K, resamples, generator)]
    means_RC: Floats = np.concatenate(blocks) / len(score_NC)
    return means_RC


def _multinomial_counts(
    times_K: NDArray[np.int64], resamples: int, generator: np.random.Generator
) -> Iterator[Floats]:
    total = int(times_K.sum())
    yield generator.multinomial(total, times_K / total, size=resamples).astype(float)


def _uniform_counts(
    times_K: NDArray[np.int64], resamples: int, generator: np.random.Generator
) -> Iterator[Floats]:
    """Yield the counts of resamples block by block, from uniform draws of samples."""
    kind_N = np.repeat(np.arange(len(times_K)), times_K)
    kinds, total = len(times_K), len(kind_N)
    size = max(1, DRAWS_PER_BLOCK // total)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn_BN = generator.integers(0, total, size=(rows, total))
        if kinds < total:
            drawn_BN = kind_N[drawn_BN]
        # Each resample is counted in its own section of one long histogram.
        drawn_BN += np.arange(rows)[:, None] * kinds
        count_BK = np.bincount(drawn_BN.ravel(), minlength=rows * kinds).reshape(rows, kinds)
        yield count_BK.astype(float)
