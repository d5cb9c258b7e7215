"""Base class of methods that remove a given share of a MoE model's expert weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

from pydantic import Field

from bench.data.calibration import Calibration
from bench.errors import UserError
from bench.method import Context, Method
from bench.models.anatomy import Anatomy, MoEBlock
from bench.models.packed import packed_linears
from methods.micro_experts import view


class MoEPruning(Method):
    """A method with a `ratio`: the share of weights to remove.

    `base` defines the whole: `moe`, the weights of all routed and shared experts, or `total`, all
    weights of the model, the removed ones still being taken from the experts only. The papers' 20 %
    of DeepSeek-MoE-16B is 0.2 of `total` and about 0.21 of `moe`.
    """

    ratio: float = Field(ge=0, lt=1)
    base: Literal["moe", "total"] = "moe"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a model without MoE blocks, and a ratio that would remove every expert."""
        if not anatomy.moe:
            raise UserError(
                f"{type(self).__name__} removes experts, but {anatomy.architecture} "
                f"({anatomy.model_type}) has none: choose a mixture-of-experts model"
            )
        share = self.share(anatomy)
        if share >= 1:
            most = anatomy.moe_parameters / anatomy.parameters
            raise UserError(
                f"ratio={self.ratio} with base=total would remove every expert: experts hold only "
                f"{most:.1%} of the weights of {anatomy.architecture}; use a lower ratio"
            )

    def share(self, anatomy: Anatomy) -> Fraction:
        """Return the share of expert weights to remove as an exact fraction."""
        # repr gives the decimal as typed. The binary float is slightly off, and its product with a
        # count may floor to one micro-expert less: 0.29 * 100 is 28.999...
        ratio = Fraction(repr(self.ratio))
        if self.base == "moe":
            return ratio
        return ratio * anatomy.parameters / anatomy.moe_parameters

    def budgets(self, anatomy: Anatomy) -> list[int]:
        """Return the number of micro-experts to remove per block: the same share, rounded down."""
        share = self.share(anatomy)
        return [math.floor(share * block.micro_experts) for block in anatomy.moe]


def achieved(anatomy: Anatomy, removed: Sequence[int]) -> dict[str, Any]:
    """Return the counts and the achieved ratio on both bases, as stored in the record."""
    micro_experts = sum(block.micro_experts for block in anatomy.moe)
    # A micro-expert is one gate row, one up row and one down column: 3·D weights.
    weights = sum(
        3 * block.d_model * count for block, count in zip(anatomy.moe, removed, strict=True)
    )
    return {
        "removed_micro_experts": sum(removed),
        "micro_experts": micro_experts,
        "removed_parameters": weights,
        "ratio_of_moe": weights / anatomy.moe_parameters,
        "ratio_of_total": weights / anatomy.parameters,
    }


def refuse_offloaded(blocks: Sequence[MoEBlock]) -> None:
    """Raise if expert weights are offloaded or packed, and so cannot be modified in place."""
    refuse_packed(blocks)
    for block in blocks:
        # accelerate keeps offloaded weights on the meta device. The first expert stands for the
        # block.
        if view(block, 0).down.is_meta:
            raise UserError(
                f"the weights of {block.name} are offloaded, but this method modifies them in "
                "memory: choose a model.device_map that fits"
            )


def refuse_packed(blocks: Sequence[MoEBlock]) -> None:
    """Raise if expert weights are packed, and so cannot be modified."""
    for block in blocks:
        if any(True for _ in packed_linears(block.block)):
            raise UserError(
                f"the weights of {block.name} are quantized already: list pruning methods before "
                "the quantization method, and use only one of the latter"
            )


def calibration_of(context: Context) -> Calibration:
    """Return the calibration text of a run; raise if the run has none."""
    if context.calibration is None:
        raise UserError("this method needs calibration text: set calibration=NAME")
    return context.calibration
