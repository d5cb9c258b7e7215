"""Base class of methods that remove individual micro-experts."""

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
    """A method that removes selected micro-experts from every block.

    `state` says how: `zeroed` as in the CAMERA paper, or `removed`, which computes the same
    function without storing the weights; widths are then stored as multiples of `align`.
    """

    state: Literal["zeroed", "removed"] = "zeroed"
    align: int = Field(default=16, ge=1)

    def take_out(self, block: MoEBlock, indices: Tensor) -> dict[str, Any]:
        """Remove the micro-experts at flat indices from one block; return its report entry."""
        # Counted first: after removal the block no longer describes the network.
        layer = {"layer": block.layer, "removed": len(indices), **census(block, indices)}
        if self.state == "zeroed":
            zero(block, indices)
        # With nothing to remove the block stays in its published layout, not a ragged one.
        elif len(indices):
            layer["padding_micro_experts"] = remove(block, indices, self.align)
        return layer

    def conclude(
        self, model: Model, anatomy: Anatomy, layers: list[dict[str, Any]], **more: Any
    ) -> MethodReport:
        """Build the report of all blocks.

        `anatomy` is the structure before removal: ratios refer to that model.
        """
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
