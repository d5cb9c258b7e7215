"""Bit budgets: divide parts among bit widths, choose bits under a budget, and count bits.

Shapes: L levels of bits; I items, O options; N directions, E experts, B choices of bits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.errors import UserError
from bench.models.bitpacking.packed_shape import PackedShape


def exact_fraction(decimal: float) -> Fraction:
    """Return the decimal that a float prints as, as an exact fraction."""
    return Fraction(repr(decimal))


def mean_bits_of(bits: Sequence[int], shares: Sequence[float]) -> Fraction:
    """Return the mean bits of parts whose sizes are in proportion to `shares`."""
    weights = [exact_fraction(share) for share in shares]
    return sum((b * w for b, w in zip(bits, weights, strict=True)), Fraction()) / sum(weights)


def level_sizes(
    bits: Sequence[int], shares: Sequence[float] | None, mean: Fraction, count: int
) -> list[int]:
    """Divide `count` parts among the levels, as close to `shares` as the exact mean allows.

    Without `shares`, the division is as even as possible. The total number of bits B is the largest
    that the levels can produce without exceeding mean · count, so the mean is exact if mean · count
    can be produced, and otherwise less than 8 / count too low. The division solves the integer
    program: minimise Σ_l |n_l - s_l N| subject to Σ n_l = N and Σ b_l n_l = B.

    Raises:
        UserError: no such division exists.
    """
    # Imported here because it takes most of a second, which other methods should not wait for.
    from scipy.optimize import Bounds, LinearConstraint, milp

    proportions = (
        [exact_fraction(share) for share in shares] if shares else [Fraction(1)] * len(bits)
    )
    wanted_L = np.array([float(p * count / sum(proportions)) for p in proportions])
    levels, total = len(bits), _largest_reachable_total(bits, mean, count)
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


def _largest_reachable_total(bits: Sequence[int], mean: Fraction, count: int) -> int:
    """Return the largest total of bits up to mean · count that the levels can produce."""
    total = math.floor(mean * count)
    # Moving a part from one level to another changes the total by a difference of bits, so totals
    # are congruent to bits[0] · count modulo the gcd of the differences. Rounding down, never up:
    # mean_bits is a budget. Python's % is not negative, so this also holds when the total is below
    # bits[0] · count.
    step = math.gcd(*(b - bits[0] for b in bits))
    return total - (total - bits[0] * count) % step if step else total


FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def solve_multiple_choice_knapsack(
    loss_IO: FloatArray, cost_IO: IntArray, budget: int, at_least: Mapping[int, int] | None = None
) -> IntArray:
    """Choose one option per item, [I], so that the total loss is least within a cost of `budget`.

    This is a multiple-choice knapsack problem: minimise Σ_io loss_io z_io subject to Σ_o z_io = 1,
    Σ_io cost_io z_io ≤ budget and z binary. `at_least` maps an option to the number of items that
    must take it. HiGHS proves optimality up to 1e-9 of the greatest loss.

    Raises:
        UserError: no choice is within the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    items, options = loss_IO.shape
    if not items:
        return np.zeros(0, dtype=np.int64)
    # Costs in units of their gcd: the program is the same, with coefficients small enough that the
    # solver's tolerances stay far below one unit.
    step = int(np.gcd.reduce(cost_IO, axis=None)) or 1
    # Variable i * options + o is z_io, as in a flattened [I, O] array.
    every = np.arange(items * options)
    one_each = csr_array((np.ones(every.size), (every // options, every)))
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(cost_IO.reshape(1, -1) / step, -np.inf, budget // step),
    ]
    for option, count in (at_least or {}).items():
        constraints.append(LinearConstraint((every % options == option)[None], count, np.inf))
    # HiGHS stops at an absolute gap of 1e-6; losses scaled to at most 1000 make that 1e-9 of the
    # greatest.
    scale = float(np.abs(loss_IO).max()) / 1000
    found = milp(
        c=loss_IO.flatten() / (scale or 1.0),
        integrality=np.ones(every.size),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0},
    )
    if not found.success:
        raise UserError(f"no choice of bits fits into a budget of {budget} bits: raise the budget")
    # argmax instead of a comparison with 1: the solver returns floats that are integral up to a
    # tolerance.
    return np.asarray(found.x.reshape(items, options).argmax(1), dtype=np.int64)


_BISECTIONS = 60


def choose_bits_of_directions(
    loss_NEB: Tensor, costs: Sequence[int], shared: float, budget: float
) -> Tensor:
    """Return the index of the choice of every direction in every expert, int64 [N, E].

    A direction that any expert stores costs `shared` in addition, for its row of the basis. The
    first choice stores nothing. The result minimises loss + λ · cost for the least λ whose cost is
    within the budget, so no choice of the same cost loses less (Everett 1963). It solves in seconds
    what has too many items for `solve_multiple_choice_knapsack`, and may leave as much of the
    budget as a direction costs.
    """
    cost_B = torch.tensor(costs, dtype=torch.float64, device=loss_NEB.device)

    def chosen(multiplier: float) -> tuple[Tensor, float]:
        best_NE, choice_NE = (loss_NEB + multiplier * cost_B).min(2)
        paid_N = best_NE.sum(1) + multiplier * shared
        choice_NE = choice_NE * (paid_N < loss_NEB[..., 0].sum(1))[:, None]
        return choice_NE, float(cost_B[choice_NE].sum() + shared * choice_NE.any(1).sum())

    found, cost = chosen(0.0)
    if cost <= budget:
        return found
    high = 1.0
    while chosen(high)[1] > budget:
        high *= 2
    # Losses may be many orders of magnitude below one per bit.
    while high > torch.finfo(torch.float64).tiny and chosen(high / 2)[1] <= budget:
        high /= 2
    low = high / 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if chosen(middle)[1] <= budget else (middle, high)
    return chosen(high)[0]


@dataclass
class BitCount:
    """Number of weights before quantization, and the bits of their codes and of their grids."""

    weights: int = 0
    weight_bits: int = 0
    overhead_bits: int = 0

    def add(self, weights: int, shapes: Iterable[PackedShape], beside: int = 0) -> None:
        """Add matrices that replace `weights` weights, and the bits stored `beside` them.

        Removed weights are included in `weights` but not in `shapes`.
        """
        self.weights += weights
        self.overhead_bits += beside
        for shape in shapes:
            self.weight_bits += shape.weight_bits
            self.overhead_bits += shape.overhead_bits

    def summary(self) -> dict[str, float]:
        """Return the mean bits per weight, without and with scales, offsets and column orders."""
        total = self.weight_bits + self.overhead_bits
        return {
            "weights": self.weights,
            "weight_bits": self.weight_bits,
            "overhead_bits": self.overhead_bits,
            "mean_bits": self.weight_bits / self.weights if self.weights else 0.0,
            "mean_bits_with_overhead": total / self.weights if self.weights else 0.0,
        }


def weights_by_bits(shapes: Iterable[PackedShape]) -> dict[str, int]:
    """Return the number of weights per bit width."""
    counts: Counter[int] = Counter()
    for shape in shapes:
        for block in shape.blocks():
            counts[block.bits] += block.area
    # Strings: the record is JSON, whose keys cannot be integers.
    return {str(bits): counts[bits] for bits in sorted(counts)}
