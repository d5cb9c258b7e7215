"""Grids and rounding to nearest against brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.moe.quantizer.grid import fit_grid, round_to_nearest, round_weights


def matrix(rows=16, columns=32, seed=0):
    return torch.randn(rows, columns, generator=torch.manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**32))
def test_no_weight_is_further_away_than_half_a_step(bits, seed):
    weight_RC = matrix(seed=seed)
    grid = fit_grid(weight_RC, torch.full((16,), bits))
    codes_RC = grid.codes(weight_RC)
    assert codes_RC.min() >= 0
    assert codes_RC.max() <= 2**bits - 1
    # Half precision moves the ends by at most 2^-11 of the range.
    slack_R1 = grid.scale / 2 + weight_RC.abs().amax(1, keepdim=True) * 2**-9
    assert ((weight_RC - grid.values(codes_RC)).abs() <= slack_R1).all()


def test_one_bit_is_mean_plus_or_minus_mean_deviation():
    weight_RC = matrix()
    grid = fit_grid(weight_RC, torch.ones(16, dtype=torch.int64))
    mean_R = weight_RC.mean(1)
    spread_R = (weight_RC - mean_R[:, None]).abs().mean(1)
    low_R, high_R = grid.offset[:, 0], (grid.offset + grid.scale)[:, 0]
    torch.testing.assert_close(low_R, mean_R - spread_R, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(high_R, mean_R + spread_R, rtol=1e-3, atol=1e-3)
    error = (weight_RC - grid.values(grid.codes(weight_RC))).square().mean()
    # A normal distribution cut at its mean leaves 1 - 2/π of its variance.
    assert error == pytest.approx(1 - 2 / torch.pi, abs=0.05)


def test_rows_may_have_different_bits():
    weight_RC = matrix()
    bits_R = torch.tensor([1, 2, 3, 4] * 4)
    codes_RC = fit_grid(weight_RC, bits_R).codes(weight_RC)
    assert torch.equal(codes_RC.amax(1), 2.0**bits_R - 1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_least_error_is_never_worse_than_the_whole_range(bits):
    weight_RC = matrix()
    errors = [
        (weight_RC - round_weights(weight_RC, bits, 16, clip)).square().sum(1)
        for clip in ("mse", "minmax")
    ]
    assert (errors[0] <= errors[1]).all()
    assert errors[0].sum() < 0.95 * errors[1].sum() or bits == 4


def transcribed(row, bits, kind):
    """The values of a row on a grid with a code for 0, weight by weight (GPTQ's release)."""
    low, high, most = min(*row, 0.0), max(*row, 0.0), 2**bits - 1
    if kind == "symmetric":
        high = max(high, -low)
        low = -high
    scale = torch.tensor((high - low) / most).bfloat16().item()
    zero = (most + 1) // 2 if kind == "symmetric" else min(most, round(-low / scale))
    return [scale * (min(max(round(w / scale) + zero, 0), most) - zero) for w in row]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**32), st.sampled_from([0.0, 1.0, -3.0]))
@pytest.mark.parametrize("kind", ["symmetric", "zero_point"])
def test_grids_with_a_code_for_zero_are_those_of_their_definition(kind, bits, seed, shift):
    weight_RC = matrix(rows=3, columns=8, seed=seed) + shift
    found_RC = round_weights(weight_RC, bits, 8, kind=kind)
    wanted = [transcribed(row, bits, kind) for row in weight_RC.tolist()]
    # A quotient just beside a half may fall to either side in single precision.
    step_R1 = fit_grid(weight_RC, torch.full((3,), bits), kind=kind).scale
    apart_RC = (found_RC - torch.tensor(wanted)).abs() / step_R1
    beside_RC = (apart_RC < 1.001) & (((weight_RC / step_R1) % 1 - 0.5).abs() < 1e-3)
    assert ((apart_RC < 1e-3) | beside_RC).all()
    assert torch.equal(step_R1.bfloat16().float(), step_R1.half().float())


def test_constant_rows_are_exact():
    weight_RC = torch.tensor([[0.0] * 8, [0.5] * 8, [-2.0] * 8])
    for bits in (1, 2, 8):
        assert torch.equal(round_weights(weight_RC, bits, 4), weight_RC)


def test_values_of_the_codes_are_the_rounded_weights():
    weight_RC, groups = matrix(4, 10), [slice(0, 4), slice(4, 8), slice(8, 10)]
    bits_RG = torch.full((4, 3), 8)
    quantized = round_to_nearest(weight_RC, groups, bits_RG)
    assert quantized.codes.dtype == torch.uint8
    torch.testing.assert_close(quantized.values(groups), weight_RC, rtol=0.02, atol=0.02)
    some = quantized.rows(slice(1, 3))
    assert torch.equal(some.values(groups), quantized.values(groups)[1:3])
