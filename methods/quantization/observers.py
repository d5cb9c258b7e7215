"""What is gathered about a block's experts while calibration text passes.

Shapes: T tokens, S tokens of one expert, D d_model, F an expert's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from bench.models.anatomy import MoEBlock
from bench.models.observation import Observer
from methods.quantization.backend import ExpertHessians
from methods.quantization.hessian import Hessian
from methods.quantization.plan import ExpertPlan, uniform
from methods.walking import refuse_nan


class Planner(Observer, Protocol):
    """Sees a block compute, then says how each of its routed experts is to be packed."""

    def plans(self) -> list[ExpertPlan]:
        """Return a plan for every routed expert in order."""

    def details(self) -> dict[str, Any]:
        """Return what the record should keep about the choice, as JSON values."""


class Blind:
    """An observer that takes no notice; others override what they need."""

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Ignore the tokens of one routed expert."""

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """Ignore the shared experts."""

    def output(self, y_TD: Tensor) -> None:
        """Ignore the block's output."""


class Uniform(Blind):
    """Plans the same bits for all experts of a block."""

    def __init__(self, block: MoEBlock, bits: int, group: int) -> None:
        self._block, self._bits, self._group = block, bits, group

    def plans(self) -> list[ExpertPlan]:
        """Return equal plans."""
        experts = range(self._block.num_experts)
        return [uniform(self._block.expert(e), self._bits, self._group) for e in experts]

    def details(self) -> dict[str, Any]:
        """Nothing was chosen."""
        return {}


class BlockHessians(Blind):
    """The Hessians of every routed expert: E · (D² + F²) float32 numbers."""

    def __init__(self, block: MoEBlock) -> None:
        self._block = block
        device = block.expert(0).down.device
        self.experts = [
            ExpertHessians(Hessian(block.d_model, device), Hessian(width, device))
            for width in block.widths
        ]

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one routed expert."""
        self.experts[expert].inputs.add(x_SD)
        self.experts[expert].hidden.add(hidden_SF)

    def refuse_not_finite(self) -> None:
        """Raise when an activation was NaN or infinite."""
        for expert in self.experts:
            for hessian in (expert.inputs, expert.hidden):
                refuse_nan(self._block, hessian.sum_CC.diagonal())


class Several:
    """Shows everything to several observers."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Show the tokens of one routed expert."""
        for observer in self._observers:
            observer.routed(expert, x_SD, hidden_SF, weight_S)

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """Show all tokens of the shared experts."""
        for observer in self._observers:
            observer.shared(x_TD, hidden_TF, weight_T)

    def output(self, y_TD: Tensor) -> None:
        """Show the block's output."""
        for observer in self._observers:
            observer.output(y_TD)
