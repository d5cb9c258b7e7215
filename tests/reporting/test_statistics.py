"""The statistics against scipy's and against slow transcriptions of their definitions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bench.reporting.statistics import (
    _multinomial_counts,
    _uniform_counts,
    bootstrap_p,
    detectable_difference,
    holm,
    least_p,
    mcnemar,
    min_significant_flips,
    percentile_interval,
    resampled_means,
)

COUNTS = st.integers(0, 200)
P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@given(COUNTS, COUNTS)
def test_mcnemar_is_the_binomial_test_of_a_fair_coin(gained, lost):
    exact = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost).exact == pytest.approx(exact, abs=1e-12)


@given(COUNTS, COUNTS)
def test_mcnemar_does_not_care_who_is_the_baseline_and_mid_p_is_smaller(gained, lost):
    assert mcnemar(gained, lost) == mcnemar(lost, gained)
    assert 0 <= mcnemar(gained, lost).mid <= mcnemar(gained, lost).exact <= 1


@pytest.mark.parametrize(("gained", "lost"), [(2, 7), (0, 5), (4, 4), (1, 0)])
def test_mid_p_counts_outcomes_as_likely_as_the_one_at_hand_half(gained, lost):
    flips = gained + lost
    ways = [math.comb(flips, k) for k in range(flips + 1)]
    rarer = sum(w for w in ways if w < ways[gained])
    alike = sum(w for w in ways if w == ways[gained])
    mid = (rarer + alike / 2) / 2**flips
    assert mcnemar(gained, lost).mid == pytest.approx(mid)


def _closed_testing(p_values):
    """Holm's adjusted p-value is the largest Bonferroni p over all intersections with a test."""
    everything = range(len(p_values))
    adjusted = []
    for one in everything:
        subsets = (
            subset
            for size in range(1, len(p_values) + 1)
            for subset in itertools.combinations(everything, size)
            if one in subset
        )
        adjusted.append(max(min(1, len(s) * min(p_values[i] for i in s)) for s in subsets))
    return adjusted


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_is_bonferroni_over_all_intersections(p_values):
    assert holm(p_values) == pytest.approx(_closed_testing(p_values))


@given(P_VALUES)
def test_holm_keeps_the_order_and_lies_between_p_and_bonferroni(p_values):
    adjusted = holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1, p * len(p_values)) + 1e-12
    for (p, q), (r, s) in itertools.combinations(zip(p_values, adjusted, strict=True), 2):
        assert (p - r) * (q - s) >= 0


def test_holm_of_nothing_is_nothing():
    assert holm([]) == []


@pytest.mark.parametrize("kinds", [2, 40, None])
def test_the_interval_is_that_of_scipy(kinds):
    """Accuracies, a few values, all values different: two ways of drawing, one distribution."""
    generator = np.random.default_rng(1)
    score_NC = generator.normal(size=(300, 2))
    if kinds is not None:
        score_NC = generator.integers(0, kinds, size=(300, 2)) / kinds
    means_RC = resampled_means(score_NC, np.random.default_rng(2), 20_000)
    ours = percentile_interval(means_RC[:, 1] - means_RC[:, 0])
    theirs = stats.bootstrap(
        (score_NC[:, 1], score_NC[:, 0]),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        batch=2_000,
        rng=np.random.default_rng(3),
    ).confidence_interval
    noise = 0.05 * (score_NC[:, 1] - score_NC[:, 0]).std() / math.sqrt(300)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=2 * noise)


@pytest.mark.parametrize("draw", [_multinomial_counts, _uniform_counts])
def test_counts_have_the_moments_of_the_multinomial(draw):
    times_K = np.array([1, 5, 14])
    count_RK = np.concatenate(list(draw(times_K, 40_000, np.random.default_rng(0))))
    share_K = times_K / 20
    covariance_KK = 20 * (np.diag(share_K) - np.outer(share_K, share_K))
    assert (count_RK.sum(axis=1) == 20).all()
    assert count_RK.mean(axis=0) == pytest.approx(times_K, abs=0.05)
    assert np.cov(count_RK.T) == pytest.approx(covariance_KK, abs=0.1)


@given(
    st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=1, max_size=60),
    st.integers(-3, 3),
    st.sampled_from([0.25, 0.5, 1.0, 3.0]),
)
def test_means_stay_within_the_scores_and_follow_shift_and_scale(rows, shift, scale):
    score_NC = np.array(rows, dtype=float)
    one = resampled_means(score_NC, np.random.default_rng(0), 50)
    assert one.shape == (50, 2)
    assert (one <= score_NC.max(axis=0) + 1e-9).all()
    assert (one >= score_NC.min(axis=0) - 1e-9).all()
    other = resampled_means(score_NC * scale + shift, np.random.default_rng(0), 50)
    assert other == pytest.approx(one * scale + shift)


def test_runs_that_score_alike_differ_in_no_resample():
    score_N = np.random.default_rng(0).random(500)
    means_RC = resampled_means(np.stack([score_N, score_N], axis=1), np.random.default_rng(0))
    difference_R = means_RC[:, 1] - means_RC[:, 0]
    assert (difference_R == 0).all()
    assert percentile_interval(difference_R) == (0, 0)
    assert bootstrap_p(difference_R) == 1


def test_the_p_value_meets_the_level_where_the_interval_meets_the_hypothesis():
    draw_R = np.random.default_rng(0).normal(size=9_999)
    low, high = percentile_interval(draw_R)
    assert bootstrap_p(draw_R, low) == pytest.approx(0.05, abs=1e-3)
    assert bootstrap_p(draw_R, high) == pytest.approx(0.05, abs=1e-3)
    assert bootstrap_p(draw_R, 100.0) == 2 / 10_000


@pytest.mark.parametrize("units", [1, 2, 3, 6, 10])
def test_the_least_p_is_that_of_all_sign_flips(units):
    differences = np.arange(1, units + 1)
    means = [
        abs(float((np.array(signs) * differences).mean()))
        for signs in itertools.product((1, -1), repeat=units)
    ]
    observed = float(differences.mean())
    assert least_p(units) == sum(mean >= observed for mean in means) / len(means)


def test_a_detectable_difference_is_found_in_four_cases_of_five():
    """A simulation of the test that the formula is about."""
    generator = np.random.default_rng(0)
    samples, spread = 200, 0.6
    truth = detectable_difference(spread / math.sqrt(samples))
    mean_T = generator.normal(truth, spread / math.sqrt(samples), size=20_000)
    found = np.abs(mean_T) > stats.norm.ppf(0.975) * spread / math.sqrt(samples)
    assert found.mean() == pytest.approx(0.8, abs=0.01)


@given(st.floats(0.001, 0.2))
def test_fewer_flips_than_the_fewest_are_never_significant(level):
    fewest = min_significant_flips(level)
    assert mcnemar(0, fewest).exact <= level
    assert mcnemar(0, fewest - 1).exact > level
