"""What is to be done to one expert: which micro-experts are stored in which order with which bits.

Shapes: D d_model, F the expert's width, f the micro-experts that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.models.anatomy import ExpertView
from bench.models.packed import Level, PackedShape


@dataclass(frozen=True)
class MatrixPlan:
    """A matrix's packed shape, and the order in which its input columns are stored, if any."""

    shape: PackedShape
    order_C: Tensor | None = None


@dataclass(frozen=True)
class ExpertPlan:
    """The kept micro-experts of an expert in the order of storage, [f], and its matrices."""

    order_f: Tensor
    gate: MatrixPlan
    up: MatrixPlan
    down: MatrixPlan

    @property
    def shapes(self) -> tuple[PackedShape, PackedShape, PackedShape]:
        """The shapes of gate, up and down."""
        return self.gate.shape, self.up.shape, self.down.shape


def tied(
    order_f: Tensor, levels: Sequence[Level], d_model: int, group: int, down_group: int
) -> ExpertPlan:
    """Return the plan that gives a micro-expert's gate row, up row and down column equal bits.

    `levels` run over micro-experts in the order of storage. So bits vary over the rows of gate
    and up, and over the columns of down.
    """
    kept = tuple(level for level in levels if level.size)
    width = len(order_f)
    rows = MatrixPlan(PackedShape(width, d_model, kept, "rows", group))
    down = MatrixPlan(PackedShape(d_model, width, kept, "columns", down_group))
    return ExpertPlan(order_f, rows, rows, down)


def uniform(view: ExpertView, bits: int, group: int) -> ExpertPlan:
    """Return the plan that gives all weights of an expert equal bits and keeps its order."""
    width, d_model = view.gate.shape
    order_f = torch.arange(width, device=view.gate.device)
    return tied(order_f, [Level(bits, width)], d_model, group, group)
