"""Plan of a packed expert: the micro-experts stored, their order and their bits.

Shapes: D d_model, F the expert's width, f the kept micro-experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.models.bitpacking.packed_shape import Level, PackedShape
from bench.models.structure.expert_view import ExpertView


@dataclass(frozen=True)
class MatrixPlan:
    """Packed shape of a matrix, and the storage order of its input columns if permuted."""

    shape: PackedShape
    order_C: Tensor | None = None


@dataclass(frozen=True)
class ExpertPlan:
    """An expert's kept micro-experts in storage order, [f], and the plans of its matrices."""

    order_f: Tensor
    gate: MatrixPlan
    up: MatrixPlan
    down: MatrixPlan

    @property
    def shapes(self) -> tuple[PackedShape, PackedShape, PackedShape]:
        """The shapes of gate, up and down."""
        return self.gate.shape, self.up.shape, self.down.shape


def tied_plan(
    order_f: Tensor, levels: Sequence[Level], d_model: int, group: int, down_group: int
) -> ExpertPlan:
    """Plan an expert in which all weights of a micro-expert get the same bits.

    `levels` cover the micro-experts in storage order, so bits vary over the rows of gate and up and
    over the columns of down.
    """
    kept = tuple(level for level in levels if level.size)
    width = len(order_f)
    # One object for gate and up: the rounder detects it and inverts their Hessian once.
    rows = MatrixPlan(PackedShape(width, d_model, kept, "rows", group))
    down = MatrixPlan(PackedShape(d_model, width, kept, "columns", down_group))
    return ExpertPlan(order_f, rows, rows, down)


def uniform_plan(view: ExpertView, bits: int, group: int) -> ExpertPlan:
    """Plan an expert with the same bits for all weights, in its original order."""
    width, d_model = view.gate.shape
    order_f = torch.arange(width, device=view.gate.device)
    return tied_plan(order_f, [Level(bits, width)], d_model, group, group)
