"""CAMERA-Q-dagger, the paper's ablation: bits allocated over the input columns of each matrix.

Shapes: D d_model, F an expert's width, S tokens of one expert.

Here a micro-expert has no bits of its own. An input column j of a matrix W is ranked by its
contribution to the output of the matrix, [(1 - α) ‖x_j‖₂² + α ‖x_j‖∞²] · ‖W_:j‖₂², which is
CAMERA's energy with the columns of W as micro-experts. Of the paper's ablation only the split
itself is known; this ranking is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.models.anatomy import Anatomy, MoEBlock
from bench.models.packed import PackedShape
from methods.camera.analysis import BlockEnergies
from methods.camera.bits import by_energy
from methods.camera.energy import Moments, column_norms, energy
from methods.camera.quant_levels import MixedBits
from methods.micro_experts import SHARED, spans
from methods.quantization.observers import Planner
from methods.quantization.plan import ExpertPlan, MatrixPlan


class CameraQDagger(MixedBits):
    """Allocate bits over the input columns of gate, up and down, each matrix separately."""

    def check(self, anatomy: Anatomy) -> None:
        """Also refuse a mean that these bits cannot produce in some matrix."""
        super().check(anatomy)
        for size in {n for block in anatomy.moe for n in (block.d_model, *block.widths)}:
            self.levels(size)

    def planner(self, block: MoEBlock) -> Planner:
        """Return the observer that measures the columns of a block's matrices."""
        return ColumnPlanner(self, block)


class ColumnPlanner(BlockEnergies):
    """Measures every expert's inputs in addition to its micro-experts."""

    def __init__(self, method: CameraQDagger, block: MoEBlock) -> None:
        super().__init__(block)
        self._method = method
        device = block.expert(0).gate.device
        self._inputs = [Moments(block.d_model, device) for _ in range(block.num_experts)]

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one routed expert."""
        super().routed(expert, x_SD, hidden_SF, weight_S)
        # Weight 1: gate and up see their inputs before the router weight is applied.
        self._inputs[expert].add(slice(None), x_SD, torch.ones_like(weight_S))

    def plans(self) -> list[ExpertPlan]:
        """Return a plan for every routed expert; the order of down is that of its micro-experts."""
        energy_N = self.energies(self._method.peak, normalised=self._method.normalised)
        places = {expert: place for expert, place in spans(self.block) if expert != SHARED}
        return [self._plan(expert, energy_N[place]) for expert, place in places.items()]

    def details(self) -> dict[str, Any]:
        """Return nothing: the shapes say it all."""
        return {}

    def _plan(self, expert: int, energy_F: Tensor) -> ExpertPlan:
        found = self.block.expert(expert)
        order_F = by_energy(energy_F)
        # The columns of down are the micro-experts, stored in order of energy anyway; gate and up
        # need a stored permutation of their own, since the order of their inputs is the model's.
        down = MatrixPlan(self._shape(self.block.d_model, len(order_F), permuted=False))
        gate, up = (self._matrix(expert, weight_FD) for weight_FD in (found.gate, found.up))
        return ExpertPlan(order_F, gate, up, down)

    def _matrix(self, expert: int, weight_FD: Tensor) -> MatrixPlan:
        norms_D, alpha = column_norms(weight_FD), self._method.peak
        tokens = self.tokens if self._method.normalised else None
        energy_D = energy(self._inputs[expert], norms_D, alpha, tokens)
        shape = self._shape(*weight_FD.shape, permuted=True)
        return MatrixPlan(shape, by_energy(energy_D))

    def _shape(self, rows: int, columns: int, *, permuted: bool) -> PackedShape:
        levels = tuple(level for level in self._method.levels(columns) if level.size)
        return PackedShape(rows, columns, levels, "columns", self._method.group, permuted)
