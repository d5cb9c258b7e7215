"""Base class of baselines that remove whole routed experts; shared experts stay."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from bench.errors import UserError
from bench.method import MethodReport
from bench.models.anatomy import Anatomy, MoEBlock
from bench.models.model import Model
from methods.baselines.dropping import drop, router_form, settle
from methods.baselines.routing import check_router
from methods.micro_experts import census, remove, restructured, spans, zero
from methods.moe_pruning import MoEPruning, achieved

Form = Literal["zeroed", "removed", "dropped"]


@dataclass(frozen=True)
class Cut:
    """What one block loses: `whole` experts, and `rest` micro-experts of the expert `further`."""

    whole: tuple[int, ...]
    further: int | None = None
    rest: int = 0


def cut(widths: Sequence[int], order: Sequence[int], budget: int) -> Cut:
    """Spend a budget of micro-experts on experts in the given order.

    The first expert that is wider than the remaining budget loses just that many micro-experts, and
    no later expert is considered.
    """
    whole: list[int] = []
    for expert in order:
        # Stopping here, instead of looking for a narrower expert further on, keeps the order that
        # the method chose. All of the budget is spent, so methods compare at equal size.
        if widths[expert] > budget:
            return Cut(tuple(whole), expert if budget else None, budget)
        whole.append(expert)
        budget -= widths[expert]
    return Cut(tuple(whole))


class WholeExperts(MoEPruning):
    """A method that removes whole routed experts from every block.

    A block loses exactly as many micro-experts as CAMERA-P removes at the same ratio: whole experts
    as long as they fit, and random micro-experts of one further expert for the rest.

    `form` says what happens to a removed expert. `zeroed`: the router still sends tokens to it and
    it contributes nothing, as in CAMERA-P. `removed`: the same outputs without storing its weights;
    widths are then stored as multiples of `align`. `dropped`: the router no longer selects it,
    tokens are routed to the remaining experts by the model's own rule, and its weights are not
    stored; only the micro-experts of the partial expert are stored zeros.
    """

    form: Form = "zeroed"
    align: int = Field(default=16, ge=1)

    def check(self, anatomy: Anatomy) -> None:
        """Also refuse a ratio that routed experts alone cannot reach."""
        super().check(anatomy)
        budgets = (math.floor(self.share(anatomy) * b.micro_experts) for b in anatomy.moe)
        for block, budget in zip(anatomy.moe, budgets, strict=True):
            if budget > sum(block.widths):
                raise UserError(
                    f"ratio={self.ratio} removes {budget} micro-experts of {block.name}, but its "
                    f"routed experts have {sum(block.widths)}: use a lower ratio"
                )
            if self.form == "dropped":
                check_router(block)
                self._check_enough_stay(block, budget)

    def _check_enough_stay(self, block: MoEBlock, budget: int) -> None:
        """Refuse a budget with which some choice leaves fewer than top-k experts."""
        # The worst case: removing the narrowest experts first removes the largest number. Checked
        # up front because the scores that decide are known only after calibration.
        narrow_first = sorted(range(block.num_experts), key=lambda expert: block.widths[expert])
        left = block.num_experts - len(cut(block.widths, narrow_first, budget).whole)
        if left < block.top_k:
            raise UserError(
                f"ratio={self.ratio} leaves {left} of {block.num_experts} experts in {block.name}, "
                f"but a token is routed to {block.top_k}: use a lower ratio or form=zeroed"
            )

    def carry_out(
        self, block: MoEBlock, chosen: Cut, anatomy: Anatomy, seed: int
    ) -> dict[str, Any]:
        """Remove the chosen experts from one block; return its report entry."""
        whole, rest = _places(block, chosen.whole), _some(block, chosen, seed)
        further = {"expert": chosen.further, "removed": chosen.rest}
        # Counted before anything changes: `block` describes the block as it was.
        layer: dict[str, Any] = {
            "layer": block.layer,
            "removed": len(whole) + len(rest),
            **census(block, _indices(whole + rest)),
            "whole_experts": sorted(chosen.whole),
            "partial_expert": further if rest else None,
        }
        if self.form == "dropped":
            # Before the drop, while flat indices still address the block's original experts.
            zero(block, _indices(rest))
            if whole:
                check_router(block)
                layer["router"] = router_form(anatomy)
                drop(block, chosen.whole, layer["router"])
            return layer | {"zeroed_micro_experts": len(rest)}
        if self.form == "zeroed":
            zero(block, _indices(whole + rest))
            return layer | {"zeroed_micro_experts": len(whole) + len(rest)}
        if layer["removed"]:
            layer["padding_micro_experts"] = remove(block, _indices(whole + rest), self.align)
        return layer

    def report(
        self, model: Model, anatomy: Anatomy, layers: list[dict[str, Any]], **more: Any
    ) -> MethodReport:
        """Build the report of all blocks.

        `anatomy` is the structure before removal: ratios refer to that model.
        """
        removed = [layer["removed"] for layer in layers]
        zeroed = [layer.get("zeroed_micro_experts", 0) for layer in layers]
        if self.form == "dropped":
            # Only when all blocks are done: the config holds one expert count for all layers.
            settle(model, router_form(anatomy))
        elif self.form == "removed":
            restructured(model)
        details = {
            "asked": {"ratio": self.ratio, "base": self.base},
            "form": self.form,
            **achieved(anatomy, removed),
            "zeroed_parameters": achieved(anatomy, zeroed)["removed_parameters"],
            **more,
            "layers": layers,
        }
        if not sum(removed):
            return MethodReport("none", details)
        # A report of `removed` needs at least one weight that is no longer stored.
        return MethodReport("zeroed" if removed == zeroed else "removed", details)


def _indices(places: Sequence[int]) -> Tensor:
    return torch.tensor(sorted(places), dtype=torch.int64)


def _places(block: MoEBlock, experts: Sequence[int]) -> list[int]:
    """Return the flat indices of all micro-experts of some experts."""
    places = dict(spans(block))
    return [i for e in experts for i in range(places[e].start, places[e].stop)]


def _some(block: MoEBlock, chosen: Cut, seed: int) -> list[int]:
    """Draw the micro-experts that the partial expert loses, independently of other blocks."""
    if chosen.further is None:
        return []
    rng = random.Random(f"{seed}:{block.name}")
    return rng.sample(_places(block, [chosen.further]), chosen.rest)
