"""Exact shares of bits, and their division among blocks of micro-experts."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.errors import UserError
from bench.models.bitpacking.packed_shape import Level
from methods.camera.allocation import block_size, distribute_levels, energy_order, rank_blocks
from methods.moe.quantizer.bit_budget import (
    level_sizes,
    mean_bits_of,
    solve_multiple_choice_knapsack,
)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True),
    st.integers(0, 100),
    st.integers(50, 5000),
)
def test_mean_is_exact_or_the_next_that_can_be(bits, percent, count):
    bits = sorted(bits, reverse=True)
    mean = bits[-1] + Fraction(percent, 100) * (bits[0] - bits[-1])
    sizes = level_sizes(bits, None, mean, count)
    total = sum(b * n for b, n in zip(bits, sizes, strict=True))
    assert sum(sizes) == count
    assert min(sizes) >= 0
    assert 0 <= mean * count - total < 8


def test_shares_decide_where_the_mean_leaves_a_choice():
    assert level_sizes([3, 2, 1], [1, 6, 1], Fraction(2), 90112) == [11264, 67584, 11264]
    assert level_sizes([3, 2, 1], [1, 1, 1], Fraction(2), 72) == [24, 24, 24]
    assert level_sizes([3, 2, 1], None, Fraction(2), 72) == [24, 24, 24]
    assert mean_bits_of([8, 4, 2], [0.1, 0.3, 0.6]) == Fraction(16, 5)


@settings(max_examples=20, deadline=None)
@given(st.integers(6, 14), st.integers(0, 12), st.randoms(use_true_random=False))
def test_division_is_the_nearest_to_the_shares(count, extra, random):
    bits, shares = [4, 2, 1], [random.randint(1, 9) for _ in range(3)]
    mean = Fraction(count + extra, count)
    found = level_sizes(bits, shares, mean, count)

    def distance(sizes):
        wanted = [Fraction(s * count, sum(shares)) for s in shares]
        return sum(abs(n - w) for n, w in zip(sizes, wanted, strict=True))

    possible = [
        sizes
        for sizes in itertools.product(range(count + 1), repeat=3)
        if sum(sizes) == count and 4 * sizes[0] + 2 * sizes[1] + sizes[2] == count + extra
    ]
    assert float(distance(found)) == pytest.approx(float(min(map(distance, possible))))


def test_refuses_a_mean_that_the_bits_cannot_give():
    with pytest.raises(UserError, match=r"bits=\[3, 2, 1\] cannot give a mean of 4 bits over 72"):
        level_sizes([3, 2, 1], None, Fraction(4), 72)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=2, max_size=6),
    st.integers(1, 16),
    st.sampled_from(["layer", "expert"]),
    st.integers(0, 2**32),
)
def test_share_out_keeps_totals_and_follows_the_energies(widths, block, scope, seed):
    torch.manual_seed(seed)
    energies = [torch.rand(width) for width in widths]
    count = sum(widths)
    levels = [Level(3, count // 4), Level(2, count // 3)]
    levels.append(Level(1, count - levels[0].size - levels[1].size))
    dealt = distribute_levels(rank_blocks(energies, block, scope), levels, len(widths))

    for level in levels:
        assert sum(n for own in dealt for b, n in own if b == level.bits) == level.size
    for own, width in zip(dealt, widths, strict=True):
        assert sum(n for _, n in own) == width
        assert [b for b, _ in own] == sorted((b for b, _ in own), reverse=True)
    # An expert's end may be a narrower block; beyond that, each change of bits divides one at most.
    changes = [end for own in dealt for end in itertools.accumulate(n for _, n in own[:-1])]
    divided = sum(end % block != 0 for end in changes)
    assert divided <= (len(levels) - 1) + sum(width % block != 0 for width in widths)


def test_layer_scope_gives_bits_to_the_strong_expert_and_expert_scope_to_all():
    energies = [torch.arange(8.0) + 100, torch.arange(8.0)]
    levels = [Level(3, 8), Level(1, 8)]
    layer = distribute_levels(rank_blocks(energies, 2, "layer"), levels, 2)
    expert = distribute_levels(rank_blocks(energies, 2, "expert"), levels, 2)
    assert layer == [[Level(3, 8)], [Level(1, 8)]]
    assert expert == [[Level(3, 4), Level(1, 4)]] * 2


def test_order_is_of_falling_energy_and_stable():
    assert energy_order(torch.tensor([1.0, 3.0, 1.0, 2.0])).tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize(
    ("widths", "wanted"),
    [((1408,) * 64, 128), ((768,) * 128, 128), ((500,) * 2, 62), ((12, 0), 1), ((0,), 1)],
)
def test_block_is_a_group_or_an_eighth_of_an_expert(widths, wanted):
    assert block_size(widths, 128) == wanted


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**32))
def test_choice_is_the_best_of_all(items, seed):
    rng = np.random.default_rng(seed)
    cost_IO = np.sort(rng.integers(0, 20, (items, 3)), axis=1)
    loss_IO = -np.sort(-rng.lognormal(0, 3, (items, 3)), axis=1)
    budget = int(rng.integers(cost_IO[:, 0].sum(), cost_IO[:, 2].sum() + 1))
    need = {2: 1} if rng.random() < 0.3 else {}
    everything = itertools.product(range(3), repeat=items)
    allowed = [
        c
        for c in map(list, everything)
        if cost_IO[range(items), c].sum() <= budget
        and all(c.count(option) >= count for option, count in need.items())
    ]
    if not allowed:
        with pytest.raises(UserError, match="budget"):
            solve_multiple_choice_knapsack(loss_IO, cost_IO, budget, need)
        return
    best = min(loss_IO[range(items), c].sum() for c in allowed)
    found = solve_multiple_choice_knapsack(loss_IO, cost_IO, budget, need)
    assert found.tolist() in allowed
    assert loss_IO[range(items), found].sum() == pytest.approx(best, rel=1e-6)
