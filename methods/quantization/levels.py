"""How many of N equal parts get how many bits, so that the mean is exact.

Shapes: L levels of bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from bench.errors import UserError


def exact(decimal: float) -> Fraction:
    """Return the number that a decimal says, and not its binary neighbour."""
    return Fraction(repr(decimal))


def mean_of(bits: Sequence[int], shares: Sequence[float]) -> Fraction:
    """Return the mean bits of parts that are in proportion to `shares`."""
    weights = [exact(share) for share in shares]
    return sum((b * w for b, w in zip(bits, weights, strict=True)), Fraction()) / sum(weights)


def level_sizes(
    bits: Sequence[int], shares: Sequence[float] | None, mean: Fraction, count: int
) -> list[int]:
    """Divide `count` parts among the levels, as near to `shares` as the exact mean allows.

    Without shares, as near to equal ones. Together the parts get B bits, the most that the levels
    can give up to mean · count: the mean is exact where that is such a number, and less than
    8 / count below it elsewhere. An integer program: minimise Σ_l |n_l - s_l N| with Σ n_l = N
    and Σ b_l n_l = B.

    Raises:
        UserError: no such division exists.
    """
    proportions = [exact(share) for share in shares] if shares else [Fraction(1)] * len(bits)
    wanted_L = np.array([float(p * count / sum(proportions)) for p in proportions])
    levels, total = len(bits), _reachable(bits, mean, count)
    eye, ones = np.eye(levels), np.ones(levels)
    nothing = np.zeros(levels)
    found = milp(
        c=np.concatenate((nothing, ones)),
        integrality=np.concatenate((ones, nothing)),
        bounds=Bounds(0, np.inf),
        constraints=[
            LinearConstraint(np.concatenate((ones, nothing)), count, count),
            LinearConstraint(np.concatenate((np.array(bits), nothing)), total, total),
            LinearConstraint(np.hstack((eye, -eye)), -np.inf, wanted_L),
            LinearConstraint(np.hstack((-eye, -eye)), -np.inf, -wanted_L),
        ],
    )
    if not found.success:
        raise UserError(
            f"bits={list(bits)} cannot give a mean of {float(mean):g} bits over {count} "
            "micro-experts: choose another mean_bits or other bits"
        )
    return [round(size) for size in found.x[:levels]]


def _reachable(bits: Sequence[int], mean: Fraction, count: int) -> int:
    """Return the most bits up to mean · count that differ from bits[0] · count by whole steps."""
    total = math.floor(mean * count)
    step = math.gcd(*(b - bits[0] for b in bits))
    return total - (total - bits[0] * count) % step if step else total
