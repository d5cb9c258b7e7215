"""McNemar's test: did as many samples become right as became wrong?"""

from __future__ import annotations

from typing import NamedTuple

from scipy.special import bdtr
from scipy.stats import binom


class McNemar(NamedTuple):
    """Two-sided p-values: the exact one, which never errs too often, and the mid-p.

    The mid-p counts outcomes as likely as the one at hand half. It is less conservative where few
    samples differ, and can exceed its nominal level, though rarely and slightly.
    """

    exact: float
    mid: float


def mcnemar(gained: int, lost: int) -> McNemar:
    """Test `gained` against `lost`, the samples on which two models disagree.

    Under the hypothesis, each such sample is a fair coin: gained ~ Binomial(gained + lost, 1/2).
    Samples on which both are right or both wrong say nothing about the difference.

    Source: McNemar, Psychometrika 12 (1947) 153; exact and mid-p forms as in Fagerland, Lydersen
    and Laake, BMC Medical Research Methodology 13 (2013) 91.
    """
    flips, fewer = gained + lost, min(gained, lost)
    if flips == 0:
        return McNemar(1.0, 1.0)
    point = float(binom.pmf(fewer, flips, 0.5))
    if gained == lost:
        return McNemar(1.0, 1.0 - point / 2)
    exact = 2 * float(bdtr(fewer, flips, 0.5))
    return McNemar(exact, exact - point)
