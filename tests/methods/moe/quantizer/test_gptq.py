"""GPTQ against solving for each column in turn, and its Hessian."""

import pytest
import torch

from bench.models.bitpacking.packed_shape import Level, PackedShape
from methods.moe.calibration import Gram
from methods.moe.quantizer.gptq import gptq, inverse_factor
from methods.moe.quantizer.grid import fit_grid, round_to_nearest, row_bits

BY_ROWS = PackedShape(12, 16, (Level(4, 3), Level(3, 4), Level(2, 4), Level(1, 1)), "rows", 8)
BY_COLUMNS = PackedShape(12, 16, (Level(3, 6), Level(2, 10)), "columns", 4)
UNIFORM = PackedShape(12, 16, (Level(2, 12),), "rows", 128)


def inputs(tokens=200, columns=16, seed=0):
    """Inputs whose columns depend on each other, as those of a network do."""
    torch.manual_seed(seed)
    return torch.randn(tokens, columns) @ torch.randn(columns, columns)


def seen(x_SC):
    hessian = Gram.empty(x_SC.shape[1], torch.device("cpu"))
    for part in torch.split(x_SC, 64):
        hessian.add(part)
    return hessian


def slow(weight_RC, x_SC, shape, damping):
    """GPTQ as its equations 2 and 3 say it: a new inverse of the free part for every column."""
    left_RC = weight_RC.double().clone()
    hessian_CC = x_SC.double().T @ x_SC.double()
    hessian_CC += damping * hessian_CC.diagonal().mean() * torch.eye(len(hessian_CC))
    bits_RG, done_RC = row_bits(shape, torch.device("cpu")), torch.zeros_like(left_RC)
    for number, group in enumerate(shape.groups()):
        grid = fit_grid(left_RC[:, group], bits_RG[:, number])
        for column in range(group.start, group.stop):
            inverse_FF = torch.linalg.inv(hessian_CC[column:, column:])
            here_R1 = left_RC[:, column, None]
            done_RC[:, column, None] = grid.values(grid.codes(here_R1))
            error_R = (here_R1 - done_RC[:, column, None])[:, 0] / inverse_FF[0, 0]
            left_RC[:, column:] -= torch.outer(error_R, inverse_FF[0])
    return done_RC


@pytest.mark.parametrize("shape", [BY_ROWS, BY_COLUMNS, UNIFORM])
@pytest.mark.parametrize("seed", range(3))
def test_equals_a_direct_transcription(shape, seed):
    x_SC, weight_RC = inputs(seed=seed), torch.randn(12, 16)
    factor_CC, damping = inverse_factor(seen(x_SC), 0.01)
    bits_RG = row_bits(shape, torch.device("cpu"))
    quantized = gptq(weight_RC, factor_CC, shape.groups(), bits_RG)
    assert damping == 0.01
    wanted_RC = slow(weight_RC, x_SC, shape, 0.01).float()
    torch.testing.assert_close(quantized.values(shape.groups()), wanted_RC, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize(
    "shape",
    [
        PackedShape(64, 64, (Level(1, 64),), "rows", 64),
        PackedShape(64, 64, (Level(2, 64),), "rows", 16),
        PackedShape(64, 64, (Level(3, 16), Level(2, 32), Level(1, 16)), "rows", 16),
        PackedShape(64, 64, (Level(3, 16), Level(2, 32), Level(1, 16)), "columns", 16),
    ],
)
def test_error_on_the_calibration_text_is_not_above_that_of_rounding(shape, clip):
    # Of a whole matrix, that is; a single row can be unlucky.
    for seed in range(5):
        x_SC, weight_RC = inputs(600, 64, seed), torch.randn(64, 64)
        factor_CC, _ = inverse_factor(seen(x_SC), 0.01)
        bits_RG, groups = row_bits(shape, torch.device("cpu")), shape.groups()
        results = (
            gptq(weight_RC, factor_CC.float(), groups, bits_RG, clip),
            round_to_nearest(weight_RC, groups, bits_RG, clip),
        )
        errors = [(x_SC @ (weight_RC - q.values(groups)).T).square().sum() for q in results]
        assert errors[0] <= errors[1]


def test_independent_inputs_leave_nothing_to_mend():
    weight_RC = torch.randn(12, 16)
    factor_CC, _ = inverse_factor(seen(torch.eye(16)), 0.01)
    bits_RG = row_bits(UNIFORM, torch.device("cpu"))
    groups = UNIFORM.groups()
    quantized = gptq(weight_RC, factor_CC.float(), groups, bits_RG)
    assert torch.equal(quantized.codes, round_to_nearest(weight_RC, groups, bits_RG).codes)


def test_inputs_that_are_always_zero_are_rounded_and_disturb_no_other():
    x_SC, weight_RC = inputs(), torch.randn(12, 16)
    x_SC[:, [3, 15]] = 0
    factor_CC, damping = inverse_factor(seen(x_SC), 0.01)
    bits_RG = row_bits(UNIFORM, torch.device("cpu"))
    assert damping == 0.01
    assert not factor_CC[3, 4:].any()
    assert not factor_CC[:3, 3].any()
    codes_RC = gptq(weight_RC, factor_CC, UNIFORM.groups(), bits_RG).codes
    plain_RC = round_to_nearest(weight_RC, UNIFORM.groups(), bits_RG).codes
    assert torch.equal(codes_RC[:, 3], plain_RC[:, 3])


def test_factor_is_that_of_the_damped_inverse():
    x_SC = inputs()
    upper_CC, _ = inverse_factor(seen(x_SC), 0.1)
    hessian_CC = x_SC.double().T @ x_SC.double()
    damped_CC = hessian_CC + 0.1 * hessian_CC.diagonal().mean() * torch.eye(16)
    assert torch.equal(upper_CC, upper_CC.triu())
    torch.testing.assert_close(
        upper_CC.T @ upper_CC @ damped_CC, torch.eye(16).double(), rtol=1e-4, atol=1e-4
    )


def test_few_tokens_raise_the_damping():
    _, damping = inverse_factor(seen(inputs(tokens=4)), 0.01)
    assert damping == pytest.approx(0.01 * 16 / 4)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_no_factor_without_inputs(value):
    assert inverse_factor(seen(torch.full((40, 16), value)), 0.01) is None


def test_chunks_do_not_matter():
    x_SC = inputs()
    one = Gram.empty(16, torch.device("cpu"))
    one.add(x_SC)
    assert one.tokens == seen(x_SC).tokens == 200
    torch.testing.assert_close(one.total, seen(x_SC).total, rtol=1e-4, atol=1e-2)
