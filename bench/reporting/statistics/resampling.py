"""Bootstrap of means; every metric compared here is a function of means.

Shapes: N samples, C columns of scores, R resamples, K distinct rows, B resamples in a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 10_000
BLOCK = 1 << 17
"""Draws held at once: 1 MiB of them and 1 MiB of counts, which fit into the CPU cache."""
DEAR = 32
"""A binomial draw takes about as long as drawing and counting 32 uniform numbers."""


def resampled_means(
    score_NC: Floats, generator: np.random.Generator, resamples: int = RESAMPLES
) -> Floats:
    """Return column means [R, C] of R resamples of N rows, drawn with replacement.

    A row is one sample; its columns (the score of each run on it) stay together, which is what
    makes the bootstrap paired.

    The number of times each row is drawn is multinomial, and a mean depends on these counts only:
    counts @ scores / N. Equal rows are counted together. Accuracies of two runs have at most four
    distinct rows, so their counts are drawn directly; where most rows differ, uniform draws are
    counted in blocks instead, which gives the same distribution.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 8.
    """
    row_KC, times_K = np.unique(score_NC, axis=0, return_counts=True)
    # A multinomial draw costs K binomial draws per resample, counting costs N uniform ones.
    draw = _multinomial if len(row_KC) * DEAR < len(score_NC) else _counted
    blocks = [count_BK @ row_KC for count_BK in draw(times_K, resamples, generator)]
    means_RC: Floats = np.concatenate(blocks) / len(score_NC)
    return means_RC


def _multinomial(
    times_K: NDArray[np.int64], resamples: int, generator: np.random.Generator
) -> Iterator[Floats]:
    total = int(times_K.sum())
    yield generator.multinomial(total, times_K / total, size=resamples).astype(float)


def _counted(
    times_K: NDArray[np.int64], resamples: int, generator: np.random.Generator
) -> Iterator[Floats]:
    """Yield the counts of one block of resamples after another, from uniform draws of samples."""
    kind_N = np.repeat(np.arange(len(times_K)), times_K)
    kinds, total = len(times_K), len(kind_N)
    size = max(1, BLOCK // total)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn_BN = generator.integers(0, total, size=(rows, total))
        if kinds < total:
            drawn_BN = kind_N[drawn_BN]
        # Resample b counts in its own stretch of one long histogram.
        drawn_BN += np.arange(rows)[:, None] * kinds
        count_BK = np.bincount(drawn_BN.ravel(), minlength=rows * kinds).reshape(rows, kinds)
        yield count_BK.astype(float)
