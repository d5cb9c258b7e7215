"""Masks and repairs of single weights against slow transcriptions of their definitions.

Shapes: R rows, C columns, T tokens.
"""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import UserError
from methods.dense.sparsity import (
    Pattern,
    count_zeroed,
    magnitude_mask,
    sparsegpt,
    wanda_mask,
)


def problem(seed, rows=4, columns=8, tokens=50):
    """Correlated inputs, as those of real layers are, and a matrix."""
    generator = torch.Generator().manual_seed(seed)
    mix_CC = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x_TC = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix_CC
    weight_RC = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight_RC, x_TC


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.75]))
def test_wanda_zeroes_the_lowest_scores_of_each_row(seed, ratio):
    weight_RC, x_TC = problem(seed, rows=3, columns=8)
    found_RC = wanda_mask(weight_RC, x_TC.norm(dim=0), ratio, None)
    for row in range(3):
        scores = []
        for column in range(8):
            norm = sum(float(x_TC[t, column]) ** 2 for t in range(len(x_TC))) ** 0.5
            scores.append((abs(float(weight_RC[row, column])) * norm, column))
        lowest = {column for _, column in sorted(scores)[: count_zeroed(ratio, 8)]}
        assert set(found_RC[row].nonzero().flatten().tolist()) == lowest


def test_wanda_does_not_depend_on_how_scale_is_split_between_weight_and_input():
    weight_RC, x_TC = problem(0)
    scale_C = torch.rand(8, dtype=torch.float64) + 0.5
    one = wanda_mask(weight_RC, x_TC.norm(dim=0), 0.5, None)
    other = wanda_mask(weight_RC / scale_C, (x_TC * scale_C).norm(dim=0), 0.5, None)
    assert torch.equal(one, other)


@given(st.integers(0, 10_000), st.sampled_from(["2:4", "4:8"]))
def test_a_pattern_zeroes_n_of_every_m_inputs(seed, text):
    pattern = Pattern.parse(text)
    weight_RC, x_TC = problem(seed, rows=3, columns=16)
    gram_CC = (x_TC.T @ x_TC).float()
    masks = [
        magnitude_mask(weight_RC, 0.5, pattern),
        wanda_mask(weight_RC, x_TC.norm(dim=0), 0.5, pattern),
        sparsegpt(weight_RC, gram_CC, 0.5, pattern, block=8) == 0,
    ]
    for mask_RC in masks:
        assert (mask_RC.unflatten(1, (-1, pattern.run)).sum(2) == pattern.zeros).all()


def test_magnitude_ranks_over_the_whole_matrix():
    weight_RC = torch.tensor([[5.0, -1, 2], [0.5, -9, 8]])
    assert magnitude_mask(weight_RC, 0.5, None).tolist() == [
        [False, True, True],
        [True, False, False],
    ]


def obs(weight_RC, x_TC, mask_RC):
    """Optimal brain surgeon, one column at a time, with the inverse of the columns still free."""
    columns = weight_RC.shape[1]
    hessian_CC = x_TC.T @ x_TC
    hessian_CC += 0.01 * hessian_CC.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    left_RC = weight_RC.clone()
    for column in range(columns):
        free = list(range(column, columns))
        inverse = torch.linalg.inv(hessian_CC[free][:, free])
        for row in range(len(left_RC)):
            if mask_RC[row, column]:
                step = left_RC[row, column] / inverse[0, 0]
                left_RC[row, free] -= step * inverse[0]
                left_RC[row, column] = 0
    return left_RC


@pytest.mark.parametrize("seed", range(5))
def test_sparsegpt_is_the_brain_surgeon_from_left_to_right(seed):
    weight_RC, x_TC = problem(seed)
    found_RC = sparsegpt(weight_RC, x_TC.T @ x_TC, 0.5, None, block=8)
    expected_RC = obs(weight_RC, x_TC, found_RC == 0)
    torch.testing.assert_close(found_RC.double(), expected_RC, rtol=1e-4, atol=1e-5)


def test_blocks_only_change_which_weights_are_ranked_together():
    """With a pattern the choice is made run by run, so the size of a block changes nothing."""
    weight_RC, x_TC = problem(3, columns=16)
    whole, halves = (
        sparsegpt(weight_RC, x_TC.T @ x_TC, 0.5, Pattern(2, 4), block=size) for size in (16, 4)
    )
    torch.testing.assert_close(whole, halves, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_the_threshold_of_sparsegpt_is_itself_zeroed(ratio):
    weight_RC, x_TC = problem(1)
    zeros = int((sparsegpt(weight_RC, x_TC.T @ x_TC, ratio, None, block=8) == 0).sum())
    assert zeros == int(32 * Fraction(repr(ratio))) + 1


@pytest.mark.parametrize("seed", range(3))
def test_the_repair_of_sparsegpt_lowers_the_output_error(seed):
    weight_RC, x_TC = problem(seed, rows=8, columns=32, tokens=400)
    repaired_RC = sparsegpt(weight_RC, x_TC.T @ x_TC, 0.5, None).double()
    masked_RC = weight_RC.masked_fill(repaired_RC == 0, 0)

    def error(other_RC):
        return float(((weight_RC - other_RC) @ x_TC.T).square().sum())

    assert error(repaired_RC) < 0.9 * error(masked_RC)


def test_an_input_that_is_always_zero_loses_its_weights():
    weight_RC, x_TC = problem(2)
    x_TC[:, 3] = 0
    found_RC = sparsegpt(weight_RC, x_TC.T @ x_TC, 0.25, None, block=8)
    assert (found_RC[:, 3] == 0).all()
    assert found_RC.isfinite().all()


def test_ratio_zero_changes_nothing():
    weight_RC, x_TC = problem(4)
    assert not wanda_mask(weight_RC, x_TC.norm(dim=0), 0.0, None).any()
    assert not magnitude_mask(weight_RC, 0.0, None).any()
    assert torch.equal(sparsegpt(weight_RC, x_TC.T @ x_TC, 0.0, None), weight_RC.float())


def test_a_hessian_that_is_not_positive_definite_is_one_sentence():
    with pytest.raises(UserError, match="not positive definite"):
        sparsegpt(torch.ones(2, 2), torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 0.5, None)
