"""What all methods share that remove a stated share of a MoE model's expert weights."""

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
    """A method with a `ratio`: how much of the model goes.

    `base` says of what: `moe`, the weights of all routed and shared experts, or `total`, all
    weights of the model, which then all come from the experts. The papers' 20 % of
    DeepSeek-MoE-16B is 0.2 of `total` and about 0.21 of `moe`.
    """

    ratio: float = Field(ge=0, lt=1)
    base: Literal["moe", "total"] = "moe"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a model without MoE blocks and a ratio that its experts cannot give."""
        if not anatomy.moe:
            raise UserError(
                f"{type(self).__name__} removes experts, but {anatomy.architecture} "
                f"({anatomy.model_type}) has none: choose a mixture-of-experts model"
            )
        share = self.share(anatomy)
        if share >= 1:
            most = anatomy.moe_parameters / anatomy.parameters
            raise UserError(
                f"ratio={self.ratio} of all weights would remove every expert: they are only "
                f"{most:.1%} of {anatomy.architecture}"
            )

    def share(self, anatomy: Anatomy) -> Fraction:
        """Return the share of expert weights that go, exactly as the decimal ratio says it."""
        ratio = Fraction(repr(self.ratio))
        if self.base == "moe":
            return ratio
        return ratio * anatomy.parameters / anatomy.moe_parameters

    def budgets(self, anatomy: Anatomy) -> list[int]:
        """Return how many micro-experts go from each block: the same share, rounded down."""
        share = self.share(anatomy)
        return [math.floor(share * block.micro_experts) for block in anatomy.moe]


def achieved(anatomy: Anatomy, removed: Sequence[int]) -> dict[str, Any]:
    """Return the counts of a pruning and its ratio on both bases, as the record keeps them."""
    micro_experts = sum(block.micro_experts for block in anatomy.moe)
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
    """Raise when expert weights are kept elsewhere by accelerate, or packed, and so are fixed."""
    refuse_packed(blocks)
    for block in blocks:
        if view(block, 0).down.is_meta:
            raise UserError(
                f"the weights of {block.name} are offloaded: methods need them in memory, so use a "
                "model.device_map that fits"
            )


def refuse_packed(blocks: Sequence[MoEBlock]) -> None:
    """Raise when expert weights are packed and so are fixed."""
    for block in blocks:
        if any(True for _ in packed_linears(block.block)):
            raise UserError(
                f"the weights of {block.name} are quantized already: name the methods that prune "
                "before the one that quantizes, and only one that does"
            )


def calibration_of(context: Context) -> Calibration:
    """Return the calibration text that the run lends to a method that asked for it."""
    if context.calibration is None:
        raise UserError("this method needs calibration text: give calibration=NAME")
    return context.calibration
