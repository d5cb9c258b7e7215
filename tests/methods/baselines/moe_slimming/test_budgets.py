"""MoE-Slimming's budgets against slow transcriptions with the released bisection."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.baselines.coverage_budgets import (
    expert_weights,
    keep_by_coverage,
    layer_weights,
    rounded_widths,
)


def prefix_that_covers(values, share):
    """The shortest prefix of the sorted values that reaches a share of their sum."""
    values = sorted((max(value, 0.0) for value in values), reverse=True)
    if share <= 0:
        return 0
    if sum(values) == 0:
        return min(len(values), math.ceil(len(values) * share))
    reached = 0.0
    for count, value in enumerate(values, start=1):
        reached += value
        if reached >= share * sum(values):
            return count
    return len(values)


def bisected(groups, weights, keep):
    """As released, but until nothing changes: the counts of λ just above the wanted number."""
    low, high = 0.0, 1.05 / min(weights)
    for _ in range(200):
        middle = (low + high) / 2
        counts = [
            prefix_that_covers(values, min(1, middle * weight))
            for values, weight in zip(groups, weights, strict=True)
        ]
        if sum(counts) == keep:
            return counts
        low, high = (middle, high) if sum(counts) < keep else (low, middle)
    return None  # no λ keeps exactly this many


values = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=6)


@given(st.lists(st.tuples(values, st.floats(0.05, 1.0)), min_size=1, max_size=4), st.data())
def test_as_many_are_kept_as_wanted_and_as_the_bisection_finds(groups, data):
    scores, weights = [list(x) for x in zip(*groups, strict=True)]
    total = sum(map(len, scores))
    keep = data.draw(st.integers(0, total))
    counts = keep_by_coverage([torch.tensor(v).double() for v in scores], weights, keep)
    assert sum(counts) == keep
    wanted = bisected(scores, weights, keep)
    if wanted is not None:
        assert counts == wanted


def test_a_greater_weight_never_covers_less():
    scores = [torch.rand(12, generator=torch.Generator().manual_seed(3)) for _ in range(3)]
    before = 0
    for weight in (0.1, 0.3, 0.5, 1.0, 3.0):
        (_, mine, _) = keep_by_coverage(scores, [0.5, weight, 0.5], 18)
        assert mine >= before
        before = mine


def test_groups_without_any_score_keep_in_proportion_to_their_weight():
    assert keep_by_coverage([torch.zeros(10), torch.zeros(10)], [0.2, 0.1], 9) == [6, 3]


def test_layer_weights_are_smoothed_four_times():
    losses = [0.4, 0.01, 2.5]
    wanted = list(losses)
    for _ in range(4):
        wanted = [value**0.5 for value in wanted]
        mean = sum(wanted) / 3
        deviation = (sum((value - mean) ** 2 for value in wanted) / 2) ** 0.5
        wanted = [min(max(value, mean - deviation), mean + deviation) for value in wanted]
    wanted = [value / (sum(wanted) / 3) for value in wanted]
    assert layer_weights(torch.tensor(losses)) == pytest.approx(wanted, rel=1e-6)
    assert layer_weights(torch.tensor([0.7])) == [1.0]
    assert layer_weights(torch.zeros(2)) == [1.0, 1.0]


def test_expert_weights_are_roots_of_what_is_positive():
    assert expert_weights(torch.tensor([4.0, -3.0, 1.0])) == pytest.approx([2 / 3, 1e-6, 1 / 3])
    assert expert_weights(torch.tensor([-1.0, 0.0])) == [1e-6, 1e-6]


def test_rounded_widths_by_hand():
    # 9, 6 and 3 lose 1, 2 and 3: 6 in all, so two pieces of 4 return, half of one rounded up, to
    # the largest remainders of those that are left.
    assert rounded_widths([[9, 6, 3]], [[12, 12, 12]], 4, 0) == [[12, 8, 0]]
    # One piece: 6 has the larger remainder. The second layer has room, and no remainder.
    assert rounded_widths([[9, 6, 8]], [[12, 12, 12]], 4, 0) == [[8, 8, 8]]
    # All fall below the least width, and the widest comes back.
    assert rounded_widths([[3, 4], [2, 0]], [[12, 12], [12, 12]], 4, 8) == [[0, 8], [0, 0]]
    # Without a multiple the freed ones go to the others in proportion to their room.
    assert rounded_widths([[8, 6, 3]], [[12, 10, 10]], 1, 4) == [[10, 7, 0]]


@given(
    st.lists(st.lists(st.integers(0, 24), min_size=3, max_size=3), min_size=1, max_size=3),
    st.sampled_from([1, 4, 8]),
    st.integers(0, 6),
)
def test_rounded_widths_are_multiples_that_change_the_sum_little(widths, multiple, least):
    full = [[24] * 3 for _ in widths]
    found = rounded_widths(widths, full, multiple, least)
    kept = [width for layer in found for width in layer]
    assert all(width % multiple == 0 and width <= 24 for width in kept)
    assert all(width == 0 or width >= least for width in kept)
    apart = sum(kept) - sum(map(sum, widths))
    assert abs(apart) <= max(multiple, -(-least // multiple) * multiple) / 2
