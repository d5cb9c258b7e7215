"""Observers of a block's experts on calibration text, and planners of their bits.

Shapes: T tokens, S tokens of one expert, D d_model, F an expert's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from bench.models.bitpacking.packed_shape import PackedShape
from bench.models.expert_hooks import ExpertObserver
from bench.models.structure.moe_block import MoEBlock
from methods.moe.calibration import Gram, NullObserver, require_finite
from methods.moe.quantizer.expert_plan import ExpertPlan, uniform_plan
from methods.moe.quantizer.rounding import ExpertHessians


class Planner(ExpertObserver, Protocol):
    """An observer of a block that afterwards plans how each of its routed experts is packed."""

    def plans(self) -> list[ExpertPlan]:
        """Return a plan for every routed expert, in order."""

    def details(self) -> dict[str, object]:
        """Return JSON values about the choice, for the record."""


@dataclass(frozen=True)
class PackedBlock:
    """How a block's routed experts are packed: the shapes, and `bits_beside` them.

    `experts` is the module that computes them.
    """

    experts: nn.Module
    shapes: Sequence[PackedShape]
    bits_beside: int = 0


@runtime_checkable
class BlockPacker(ExpertObserver, Protocol):
    """An observer of a block that then packs all of its routed experts together."""

    def pack(self, block: MoEBlock) -> PackedBlock:
        """Return the packed experts in a module of their own."""

    def details(self) -> dict[str, object]:
        """Return JSON values about the choice, for the record."""


class UniformPlanner(NullObserver):
    """Plans the same bits for all experts of a block."""

    def __init__(self, block: MoEBlock, bits: int, group: int) -> None:
        self._block, self._bits, self._group = block, bits, group

    def plans(self) -> list[ExpertPlan]:
        """Return the same plan for every expert."""
        experts = range(self._block.num_experts)
        return [uniform_plan(self._block.expert(e), self._bits, self._group) for e in experts]

    def details(self) -> dict[str, object]:
        """Return nothing: there was no choice."""
        return {}


class BlockHessians(NullObserver):
    """Hessians of every routed expert: E · (D² + F²) float32 values."""

    def __init__(self, block: MoEBlock) -> None:
        self._block = block
        device = block.expert(0).down.device
        self.experts = [
            ExpertHessians(Gram.empty(block.d_model, device), Gram.empty(width, device))
            for width in block.widths
        ]

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one routed expert."""
        self.experts[expert].inputs.add(x_SD)
        # Without router weights: H belongs to the expert's own output, before it is scaled.
        self.experts[expert].hidden.add(hidden_SF)

    def require_finite(self) -> None:
        """Raise if an activation was NaN or infinite."""
        for expert in self.experts:
            for hessian in (expert.inputs, expert.hidden):
                # The diagonal suffices: it sums squares, so one bad value stays visible in it.
                require_finite(self._block, hessian.total.diagonal())


class CompositeObserver:
    """Forwards everything to several observers."""

    def __init__(self, observers: Sequence[ExpertObserver]) -> None:
        self._observers = observers

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Forward the tokens of one routed expert."""
        for observer in self._observers:
            observer.routed(expert, x_SD, hidden_SF, weight_S)

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """Forward all tokens of the shared experts."""
        for observer in self._observers:
            observer.shared(x_TD, hidden_TF, weight_T)

    def output(self, y_TD: Tensor) -> None:
        """Forward the block output."""
        for observer in self._observers:
            observer.output(y_TD)
