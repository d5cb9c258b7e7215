"""What methods share that choose single micro-experts: what becomes of them, and the report."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from bench.method import MethodReport
from bench.models.anatomy import Anatomy, MoEBlock
from bench.models.model import Model
from methods.micro_experts import census, remove, restructured, zero
from methods.moe_pruning import MoEPruning, achieved


class MicroPruning(MoEPruning):
    """A method that takes chosen micro-experts out of every block.

    `state` is what becomes of them: `zeroed` as in CAMERA's paper, or `removed`, which computes
    the same with weights that are really gone; widths are then stored as multiples of `align`.
    """

    state: Literal["zeroed", "removed"] = "zeroed"
    align: int = Field(default=16, ge=1)

    def take_out(self, block: MoEBlock, indices: Tensor) -> dict[str, Any]:
        """Take the micro-experts at flat indices out of one block and say how many of which."""
        layer = {"layer": block.layer, "removed": len(indices), **census(block, indices)}
        if self.state == "zeroed":
            zero(block, indices)
        elif len(indices):
            layer["padding_micro_experts"] = remove(block, indices, self.align)
        return layer

    def conclude(
        self, model: Model, anatomy: Anatomy, layers: list[dict[str, Any]], **more: Any
    ) -> MethodReport:
        """Return the report of all blocks, given the anatomy that the model had before."""
        if self.state == "removed":
            restructured(model)
        removed = [layer["removed"] for layer in layers]
        details = {
            "asked": {"ratio": self.ratio, "base": self.base},
            **achieved(anatomy, removed),
            "padding_micro_experts": sum(layer.get("padding_micro_experts", 0) for layer in layers),
            **more,
            "layers": layers,
        }
        return MethodReport(self.state if sum(removed) else "none", details)
