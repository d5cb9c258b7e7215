"""The ratio of interleaved times and its interval: exact cases, and coverage in simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.measurement.interleaving import paired_ratio

seconds = st.lists(st.floats(1e-4, 10), min_size=5, max_size=25).map(np.array)


@given(seconds, st.floats(0.1, 10))
def test_a_constant_factor_comes_back_whatever_happened_to_the_machine(taken_R, factor):
    ratio = paired_ratio(factor * taken_R, taken_R)
    assert ratio.value == pytest.approx(factor)
    assert ratio.low == pytest.approx(factor)
    assert ratio.high == pytest.approx(factor)


@given(st.integers(0, 2**32 - 1), st.integers(5, 25))
def test_the_interval_holds_the_ratio_and_all_of_it_are_ratios_that_occurred(seed, rounds):
    draws = np.random.default_rng(seed)
    above_R, below_R = draws.uniform(1, 2, rounds), draws.uniform(1, 2, rounds)
    ratio = paired_ratio(above_R, below_R)
    assert ratio.low <= ratio.value <= ratio.high
    assert (above_R / below_R).min() <= ratio.low
    assert ratio.high <= (above_R / below_R).max()


def test_a_machine_that_slows_down_halfway_changes_both_medians_but_not_the_ratio():
    drift_R = np.where(np.arange(15) < 7, 1.0, 3.0)
    noise_R = np.random.default_rng(3).normal(1, 0.002, 15)
    ratio = paired_ratio(1.25 * drift_R * noise_R, drift_R)
    assert ratio.value == pytest.approx(1.25, rel=0.005)


@pytest.mark.sample(1)
@pytest.mark.parametrize("rounds", [15, 20, 30])
def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says(rounds):
    draws = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        above_R, below_R = draws.lognormal(0, 0.05, (2, rounds))
        ratio = paired_ratio(1.5 * above_R, below_R)
        covered += ratio.low <= 1.5 <= ratio.high
    assert covered >= 194  # 198 are expected


@pytest.mark.broad
def test_going_on_until_the_interval_is_narrow_leaves_its_coverage_alone():
    """Looking again and again could stop where the interval is narrow by luck, and off."""
    draws = np.random.default_rng(2)
    covered = near = 0
    for _ in range(60):
        above_R, below_R = draws.lognormal(0, 0.04, (2, 200))
        for rounds in range(15, 201, 5):
            ratio = paired_ratio(1.5 * above_R[:rounds], below_R[:rounds])
            if ratio.relative_reach <= 0.03:
                break
        covered += ratio.low <= 1.5 <= ratio.high
        near += abs(ratio.value / 1.5 - 1) <= 0.03
    assert covered >= 57  # 59 are expected
    assert near >= 57
