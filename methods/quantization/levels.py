"""Division of N equal parts among bit widths with an exact mean.

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
    """Return a float as the decimal that it prints as, an exact fraction."""
    return Fraction(repr(decimal))


def mean_of(bits: Sequence[int], shares: Sequence[float]) -> Fraction:
    """Return the mean bits of parts whose sizes are in proportion to `shares`."""
    weights = [exact(share) for share in shares]
    return sum((b * w for b, w in zip(bits, weights, strict=True)), Fraction()) / sum(weights)


def level_sizes(
    bits: Sequence[int], shares: Sequence[float] | None, mean: Fraction, count: int
) -> list[int]:
    """Divide `count` parts among the levels, as close to `shares` as the exact mean allows.

    Without `shares`, as close to equal parts as possible. The parts get B bits in total, the
    largest total up to mean · count that the levels can produce: the mean is exact where mean ·
    count itself can be produced, and elsewhere less than 8 / count below it. An integer program:
    minimise Σ_l |n_l - s_l N| with Σ n_l = N and Σ b_l n_l = B.

    Raises:
        UserError: no such division exists.
    """
    proportions = [exact(share) for share in shares] if shares else [Fraction(1)] * len(bits)
    wanted_L = np.array([float(p * count / sum(proportions)) for p in proportions])
    levels, total = len(bits), _reachable(bits, mean, count)
    eye, ones = np.eye(levels), np.ones(levels)
    # The variables are n_l and t_l ≥ |n_l - s_l N|, which linearises the absolute value: n - t ≤ sN
    # and -n - t ≤ -sN. Only t has a cost.
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
            "micro-experts: choose different bits or a different mean_bits"
        )
    return [round(size) for size in found.x[:levels]]


def _reachable(bits: Sequence[int], mean: Fraction, count: int) -> int:
    """Return the largest total of bits up to mean · count that the levels can produce."""
    total = math.floor(mean * count)
    # Moving a part from one level to another changes the total by a difference of bits, so totals
    # are congruent to bits[0] · count modulo the gcd of the differences. Rounding down, never up:
    # mean_bits is a budget. Python's % is not negative, so this also holds when the total is below
    # bits[0] · count.
    step = math.gcd(*(b - bits[0] for b in bits))
    return total - (total - bits[0] * count) % step if step else total
