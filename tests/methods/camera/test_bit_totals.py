"""The bits of CAMERA-Q on the shapes of published models, grids included; no weights."""

from fractions import Fraction

import pytest
import torch
from torch.nn import functional

from bench.models.structure.expert_view import ExpertView
from methods.camera.allocation import block_size, distribute_levels, energy_order, rank_blocks
from methods.camera.quantization import CameraQ
from methods.moe.quantizer.expert_plan import tied_plan, uniform_plan

SHAPES = {  # routed experts, d_model, width
    "Qwen3-30B-A3B": (128, 2048, 768),
    "DeepSeek-MoE-16B": (64, 2048, 1408),
    "DeepSeek-V2-Lite": (64, 2048, 1408),
    "Qwen2-57B-A14B": (64, 3584, 2560),
    "OLMoE-1B-7B": (64, 2048, 1024),
    "Mixtral-8x7B": (8, 4096, 14336),
    "SmolLM2-135M": (1, 576, 1536),
    "SmolLM2-135M carved": (16, 576, 64),
}


def empty_expert(d_model, width):
    return ExpertView(
        torch.empty(width, d_model, device="meta"),
        torch.empty(width, d_model, device="meta"),
        torch.empty(d_model, width, device="meta"),
        functional.silu,
    )


def total_bits(plans):
    shapes = [shape for plan in plans for shape in plan.shapes]
    weights = sum(shape.rows * shape.columns for shape in shapes)
    bits = sum(shape.weight_bits + shape.overhead_bits for shape in shapes)
    return Fraction(bits, weights)


def camera_q_bits(name, method):
    experts, d_model, width = SHAPES[name]
    torch.manual_seed(0)
    energies = [torch.rand(width) * 10 ** torch.randn(1) for _ in range(experts)]
    block = method.block or block_size([width], method.group)
    ranked = rank_blocks(energies, block, method.scope)
    dealt = distribute_levels(ranked, method.levels(experts * width), experts)
    view = empty_expert(d_model, width)
    return total_bits(
        [
            tied_plan(view, energy_order(energy), levels, method.group, method.group)
            for energy, levels in zip(energies, dealt, strict=True)
        ]
    )


def gptq_bits(name, group):
    _, d_model, width = SHAPES[name]
    return total_bits([uniform_plan(empty_expert(d_model, width), 2, group)])


@pytest.mark.parametrize("name", list(SHAPES)[:6])
def test_225_is_225_on_published_shapes(name):
    assert camera_q_bits(name, CameraQ()) == Fraction(9, 4)
    assert gptq_bits(name, 128) == Fraction(9, 4)


def test_totals_are_those_of_gptq_where_levels_are_whole_groups():
    # 576 columns are 4.5 groups of 128, and 9 of 64.
    for name, group, block in (("SmolLM2-135M", 64, 64), ("SmolLM2-135M carved", 64, 64)):
        found = camera_q_bits(name, CameraQ(group=group, block=block))
        assert found == gptq_bits(name, group) == Fraction(5, 2)


def test_a_block_smaller_than_a_group_costs_grids():
    small = camera_q_bits("SmolLM2-135M carved", CameraQ(group=64))
    assert small > camera_q_bits("SmolLM2-135M carved", CameraQ(group=64, block=64))
