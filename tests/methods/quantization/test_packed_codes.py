"""Codes packed into bit planes come back unchanged, at every width and order."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.models.bitpacking.packed_modules import PackedLinear
from bench.models.bitpacking.packed_shape import (
    Level,
    PackedShape,
    bit_planes,
    pack_codes,
    packed_size,
    unpack_codes,
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 100), st.integers(0, 2**32))
def test_codes_come_back_and_take_no_more_than_their_bits(bits, count, seed):
    codes_N = torch.randint(2**bits, (count,), generator=torch.manual_seed(seed))
    packed = pack_codes(codes_N.to(torch.uint8), bits)
    assert torch.equal(unpack_codes(packed, bits, count), codes_N.to(torch.uint8))
    assert len(packed) == packed_size(count, bits)
    assert 8 * len(packed) - bits * count in range(8 * len(bit_planes(bits)))


def test_three_bits_take_three_bits():
    assert packed_size(8000, 3) == 3000
    assert bit_planes(3) == [(2, 1), (1, 0)]
    assert bit_planes(8) == [(8, 0)]


SHAPES = [
    PackedShape(6, 10, (Level(3, 2), Level(2, 3), Level(1, 1)), "rows", 4),
    PackedShape(5, 11, (Level(4, 6), Level(1, 5)), "columns", 4),
    PackedShape(5, 11, (Level(4, 6), Level(1, 5)), "columns", 4, permuted=True),
    PackedShape(3, 4, (Level(8, 3),), "rows", 128),
    PackedShape(6, 10, (Level(3, 2), Level(2, 4)), "rows", 4, grid="symmetric"),
    PackedShape(5, 11, (Level(4, 6), Level(2, 5)), "columns", 4, grid="zero_point"),
    PackedShape(0, 4, (), "rows", 2),
    PackedShape(4, 0, (), "columns", 2),
]


def random_codes(shape):
    """Codes, scales and offsets that fit a shape."""
    torch.manual_seed(0)
    codes_RC = torch.zeros(shape.rows, shape.columns, dtype=torch.uint8)
    for block in shape.blocks():
        codes_RC[block.rows, block.columns].random_(2**block.bits)
    grids = (shape.rows, len(shape.groups()))
    scale_RG = torch.rand(grids).half()
    if shape.grid == "offset":
        return codes_RC, scale_RG, torch.randn(grids).half()
    zero_RG = torch.zeros(grids)
    for block in shape.blocks():
        here = torch.randint(2**block.bits, zero_RG[block.rows, block.groups].shape)
        middle = torch.full_like(here, 2 ** (block.bits - 1))
        zero_RG[block.rows, block.groups] = (middle if shape.grid == "symmetric" else here).float()
    return codes_RC, scale_RG, -scale_RG.float() * zero_RG


def filled(shape):
    codes_RC, scale_RG, offset_RG = random_codes(shape)
    linear = PackedLinear(shape, torch.float32)
    order_C = torch.randperm(shape.columns) if shape.permuted else None
    linear.store(codes_RC, scale_RG, offset_RG, order_C)
    return linear, codes_RC, scale_RG.float(), offset_RG.float(), order_C


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_offset_plus_scale_times_code(shape):
    linear, codes_RC, scale_RG, offset_RG, order_C = filled(shape)
    for number, group in enumerate(shape.groups()):
        for column in range(group.start, group.stop):
            wanted_R = offset_RG[:, number] + scale_RG[:, number] * codes_RC[:, column]
            place = column if order_C is None else int(order_C[column])
            torch.testing.assert_close(linear.weight[:, place], wanted_R)
    x = torch.randn(7, shape.columns)
    torch.testing.assert_close(linear(x), x @ linear.weight.T)
    assert linear.weight.shape == (shape.rows, shape.columns)


@pytest.mark.parametrize("shape", SHAPES)
def test_buffers_take_the_bytes_that_the_shape_says(shape):
    linear = filled(shape)[0]
    held = sum(b.numel() * b.element_size() for b in linear.buffers())
    assert held == shape.code_bytes + shape.overhead_bits / 8
    assert 0 <= 8 * shape.code_bytes - shape.weight_bits < 8 * 4 * max(1, len(shape.levels))
    assert not list(linear.parameters())


def test_groups_do_not_cross_levels():
    assert SHAPES[0].groups() == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert SHAPES[1].groups() == [slice(0, 4), slice(4, 6), slice(6, 10), slice(10, 11)]


def test_survives_a_copy_and_its_state_dict():
    linear = filled(SHAPES[2])[0]
    other = PackedLinear(SHAPES[2], torch.float32)
    other.load_state_dict(linear.state_dict())
    for twin in (other, copy.deepcopy(linear)):
        assert torch.equal(twin.weight, linear.weight)
        assert twin.codes.data_ptr() != linear.codes.data_ptr()


def test_writing_to_the_weight_changes_nothing():
    linear = filled(SHAPES[0])[0]
    before = linear.weight
    linear.weight.zero_()
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"levels": (Level(3, 5),)},
        {"levels": (Level(0, 6),)},
        {"levels": (Level(9, 6),)},
        {"levels": (Level(3, 6),), "columns": 40000, "permuted": True},
    ],
)
def test_refuses_shapes_that_cannot_be(wrong):
    with pytest.raises(ValueError):
        PackedShape(**({"rows": 6, "columns": 10} | wrong))
