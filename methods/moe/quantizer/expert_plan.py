"""Plan of a packed expert: which micro-experts are stored, in which order, with how many bits.

Shapes: D d_model, F the expert's width, f the kept micro-experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.models.bitpacking.packed_shape import Level, PackedShape
from bench.models.structure.expert_view import ExpertView
from bench.models.structure.moe_block import MoEBlock


@dataclass(frozen=True)
class MatrixPlan:
    """Packed shape of a matrix, and the storage order of its input columns if permuted."""

    shape: PackedShape
    order_C: Tensor | None = None


@dataclass(frozen=True)
class ExpertPlan:
    """An expert's kept micro-experts in storage order, [f], and the plans of its matrices.

    `inputs` are the plans of `ExpertView.input_matrices`: gate and up, up alone, or both fused.
    """

    order_f: Tensor
    inputs: tuple[MatrixPlan, ...]
    down: MatrixPlan

    @property
    def shapes(self) -> list[PackedShape]:
        """The shapes of all matrices, down last."""
        return [plan.shape for plan in (*self.inputs, self.down)]


def tied_plan(
    view: ExpertView, order_f: Tensor, levels: Sequence[Level], group: int, down_group: int
) -> ExpertPlan:
    """Plan an expert in which all weights of a micro-expert get the same bits.

    `levels` cover the micro-experts in storage order, so bits vary over the rows of gate and up and
    over the columns of down.
    """
    kept = tuple(level for level in levels if level.size)
    width, d_model = len(order_f), len(view.down)
    down = MatrixPlan(PackedShape(d_model, width, kept, "columns", down_group))
    if view.form == "fused":
        # Gate rows, then up rows, of one matrix: the levels come twice.
        both = MatrixPlan(PackedShape(2 * width, d_model, (*kept, *kept), "rows", group))
        return ExpertPlan(order_f, (both,), down)
    # One object for gate and up: the rounder detects it and inverts their Hessian once.
    rows = MatrixPlan(PackedShape(width, d_model, kept, "rows", group))
    return ExpertPlan(order_f, (rows,) if view.form == "plain" else (rows, rows), down)


def uniform_plan(view: ExpertView, bits: int, group: int) -> ExpertPlan:
    """Plan an expert with the same bits for all weights, in its original order."""
    order_f = torch.arange(view.width, device=view.down.device)
    return tied_plan(view, order_f, [Level(bits, view.width)], group, group)


def matrix_weights(block: MoEBlock) -> int:
    """Return the number of weights in the matrices of a block's routed experts, without biases."""
    return block.matrices * block.d_model * sum(block.widths)
