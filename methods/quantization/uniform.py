"""Baselines with the same bits for all experts: rounding to nearest, and GPTQ."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from bench.method import Context
from bench.models.model import Model
from bench.models.structure.moe_block import MoEBlock
from methods.moe.quantizer.method import BitWidth, MoEQuantization
from methods.moe.quantizer.observers import Planner, UniformPlanner


class Gptq(MoEQuantization):
    """GPTQ (arXiv 2210.17323) with `bits` for every weight of the experts or feed-forwards."""

    bits: BitWidth = 2

    def planners(self, model: Model, context: Context) -> Callable[[MoEBlock], Planner]:
        """Return a factory of planners that use the same bits for all experts."""
        return lambda block: UniformPlanner(block, self.bits, self.group)


class Rtn(Gptq):
    """Rounding to nearest of the weights that GPTQ quantizes, with `bits`; no calibration."""

    uses_calibration: ClassVar[bool] = False

    rounding: Literal["rtn"] = "rtn"
