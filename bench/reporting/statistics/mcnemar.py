"""McNemar's test of whether gains and losses are balanced."""

from __future__ import annotations

from typing import NamedTuple

from scipy.special import bdtr
from scipy.stats import binom


class McNemar(NamedTuple):
    """Two-sided p-values: exact (never exceeds its nominal error rate) and mid-p.

    The mid-p counts the observed outcome half. It is less conservative where few samples differ,
    and can exceed its nominal level, though rarely and slightly.
    """

    exact: float
    mid: float


def mcnemar(gained: int, lost: int) -> McNemar:
    """Test `gained` against `lost`, the numbers of samples on which two models disagree.

    Under the null hypothesis each such sample is a fair coin: gained ~ Binomial(gained + lost,
    1/2). Samples on which both are right or both are wrong carry no information about the
    difference.

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
