"""Base classes of methods with a pruning ratio, and of those that remove micro-experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from bench.data.calibration import Calibration
from bench.errors import UserError
from bench.method import Context, LayerReport, Method, MethodReport, WeightForm
from bench.models.bitpacking.packed_modules import PackedLinear
from bench.models.model import Model
from bench.models.structure.dense_layer import state_width
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import MoEBlock
from methods.moe.micro_experts import (
    delete_micro_experts,
    expert_view,
    per_expert_counts,
    zero_micro_experts,
)

LayerEntry = dict[str, Any]
"""Report entry of one block: JSON values; `layer` and `removed` always, more by method."""


class MoEPruning(Method):
    """A method with a `ratio`: the share of weights to remove.

    `base` says of what: `moe` are the weights of all routed and shared experts, or in a dense
    decoder of all feed-forward layers; `total` are all weights of the model, although weights are
    removed from experts only. For DeepSeek-MoE-16B, the papers' 20 % is a ratio of 0.2 with `total`
    and of about 0.21 with `moe`.
    """

    accepts: ClassVar[frozenset[WeightForm]] = frozenset({"plain", "ragged"})

    ratio: float = Field(ge=0, lt=1)
    base: Literal["moe", "total"] = "moe"

    def check(self, structure: ModelStructure) -> None:
        """Refuse a model without MoE blocks, and a ratio that would remove every expert."""
        blocks = self.blocks(structure)
        if self.share(structure) >= 1:
            most = _parameters(blocks) / structure.parameters
            raise UserError(
                f"ratio={self.ratio} with base=total would remove every expert: experts hold only "
                f"{most:.1%} of the weights of {structure.architecture}; use a lower ratio"
            )

    def blocks(self, structure: ModelStructure) -> tuple[MoEBlock, ...]:
        """Return the blocks that the method changes.

        Raises:
            UserError: the model has no MoE blocks.
        """
        require_experts(structure, type(self).__name__, "removes")
        return structure.moe

    def share(self, structure: ModelStructure) -> Fraction:
        """Return the share of expert weights to remove as an exact fraction."""
        # `repr` gives the decimal as typed. The binary float is slightly off, so its product with a
        # count may round down to one micro-expert less: 0.29 * 100 is 28.999...
        ratio = Fraction(repr(self.ratio))
        if self.base == "moe":
            return ratio
        return ratio * structure.parameters / _parameters(self.blocks(structure))

    def budgets(self, structure: ModelStructure) -> list[int]:
        """Return the number of micro-experts to remove per block: the same share, rounded down."""
        share = self.share(structure)
        return [math.floor(share * block.micro_experts) for block in self.blocks(structure)]

    def planned_removals(self, structure: ModelStructure) -> list[int]:
        """Return the budgets: micro-experts per block."""
        return self.budgets(structure)


def require_experts(structure: ModelStructure, method: str, verb: str) -> None:
    """Raise if a model has no MoE blocks; `verb` says what the method does to experts."""
    if not structure.moe:
        raise UserError(
            f"{method} {verb} experts, but {structure.architecture} ({structure.model_type}) has "
            "none: choose a mixture-of-experts model"
        )


def require_routed_room(blocks: Sequence[MoEBlock], budgets: Sequence[int], ratio: float) -> None:
    """Raise if the routed experts of a block have fewer micro-experts than its budget."""
    for block, budget in zip(blocks, budgets, strict=True):
        if budget > sum(block.widths):
            raise UserError(
                f"ratio={ratio} removes {budget} micro-experts of {block.name}, but its "
                f"routed experts have {sum(block.widths)}: use a lower ratio"
            )


def require_usual_experts(blocks: Sequence[MoEBlock], method: str) -> None:
    """Raise if experts do not have the form Wdown (act(Wgate x) ⊙ Wup x)."""
    for block in blocks:
        if block.unusual is not None:
            raise UserError(
                f"{method} supports experts of the form Wdown (act(Wgate x) ⊙ Wup x), but those of "
                f"{block.name} have {block.unusual}: choose a method that only removes weights, "
                "such as camera_p or reap"
            )


def require_equal_widths(blocks: Sequence[MoEBlock], method: str) -> None:
    """Raise if the experts of a block differ in width."""
    for block in blocks:
        if len(set(block.widths)) > 1:
            raise UserError(
                f"the experts of {block.name} have different widths, but {method} needs equal "
                "ones: apply it to the unpruned model"
            )


def require_micro_experts(structure: ModelStructure, method: str) -> tuple[MoEBlock, ...]:
    """Return the MoE blocks, or the feed-forwards of a dense decoder; raise if there are none."""
    if not structure.layers:
        raise UserError(f"{method} needs a decoder; {structure.architecture} has no decoder layers")
    return structure.micro_expert_blocks


def _parameters(blocks: Sequence[MoEBlock]) -> int:
    return sum(block.parameters for block in blocks)


def achieved_ratios(structure: ModelStructure, removed: Sequence[int]) -> dict[str, float]:
    """Return the counts and the achieved ratio on both bases, as stored in the record."""
    blocks = structure.micro_expert_blocks
    weights = sum(
        block.parameters_each * count for block, count in zip(blocks, removed, strict=True)
    )
    return {
        "removed_micro_experts": sum(removed),
        "micro_experts": sum(block.micro_experts for block in blocks),
        "removed_parameters": weights,
        "ratio_of_moe": weights / _parameters(blocks),
        "ratio_of_total": weights / structure.parameters,
    }


def refuse_offloaded(blocks: Sequence[MoEBlock]) -> None:
    """Raise if expert weights are offloaded or packed, and so cannot be modified in place."""
    refuse_packed(blocks)
    for block in blocks:
        # accelerate keeps offloaded weights on the meta device. The first expert stands for the
        # block.
        if expert_view(block, 0).down.is_meta:
            raise UserError(
                f"the weights of {block.name} are offloaded, but this method modifies them in "
                "memory: choose a model.device_map that fits"
            )


def refuse_packed(blocks: Sequence[MoEBlock]) -> None:
    """Raise if expert weights are packed, and so cannot be modified."""
    for block in blocks:
        if any(isinstance(module, PackedLinear) for module in block.modules):
            raise UserError(
                f"the weights of {block.name} are quantized already: list pruning methods before "
                "the quantization method, and use only one of the latter"
            )


def refuse_packed_layer(layer: nn.Module, index: int) -> None:
    """Raise if weights of a decoder layer are packed, and so cannot be modified."""
    if any(isinstance(module, PackedLinear) for module in layer.modules()):
        raise UserError(
            f"the weights of layer {index} are quantized already: list pruning methods before "
            "the quantization method"
        )


def require_calibration(context: Context) -> Calibration:
    """Return the calibration text of a run; raise if the run has none."""
    if context.calibration is None:
        raise UserError("this method needs calibration text: set calibration=NAME")
    return context.calibration


class MicroExpertPruning(MoEPruning):
    """A method that removes selected micro-experts from every MoE block or dense feed-forward.

    `state` is `zeroed`, as in the CAMERA paper, or `removed`, which computes the same function
    without storing the weights; widths are then padded to multiples of `align`.
    """

    state: Literal["zeroed", "removed"] = "zeroed"
    align: int = Field(default=16, ge=1)

    @property
    def leaves(self) -> WeightForm | None:
        """Removal makes experts of different widths."""
        return "ragged" if self.state == "removed" else None

    def blocks(self, structure: ModelStructure) -> tuple[MoEBlock, ...]:
        """Return the MoE blocks, or the feed-forward layers of a dense decoder."""
        return require_micro_experts(structure, type(self).__name__)

    def remove_micro_experts(self, block: MoEBlock, indices: Tensor) -> LayerEntry:
        """Remove the micro-experts at flat indices from one block; return its report entry."""
        # Counted first: after removal the block no longer describes the network.
        counts = per_expert_counts(block, indices)
        layer: LayerEntry = {"layer": block.layer, "removed": len(indices), **counts}
        if self.state == "zeroed":
            zero_micro_experts(block, indices)
        # A block that loses nothing keeps its original layout instead of a ragged one.
        elif len(indices):
            layer["padding_micro_experts"] = delete_micro_experts(block, indices, self.align)
        return layer

    def build_report(
        self, model: Model, structure: ModelStructure, layers: list[LayerEntry], **more: object
    ) -> MethodReport:
        """Build the report of all blocks.

        `structure` is that of the model before removal, to which the ratios refer.
        """
        if self.state == "removed":
            model.invalidate_structure()
            if not structure.moe:
                state_width(model.network, [b.d_ff for b in model.structure.dense_blocks])
        removed = [layer["removed"] for layer in layers]
        details: dict[str, object] = {
            "requested": {"ratio": self.ratio, "base": self.base},
            **achieved_ratios(structure, removed),
            "padding_micro_experts": sum(layer.get("padding_micro_experts", 0) for layer in layers),
            **more,
        }
        effect = self.state if sum(removed) else "none"
        return MethodReport(effect, details, [LayerReport(**layer) for layer in layers])
