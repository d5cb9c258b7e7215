"""What all baselines share that remove whole routed experts and leave shared ones alone."""

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
    """What one block loses: experts as a whole, and `rest` micro-experts of one further expert."""

    whole: tuple[int, ...]
    further: int | None = None
    rest: int = 0


def cut(widths: Sequence[int], order: Sequence[int], budget: int) -> Cut:
    """Spend `budget` micro-experts on experts in the given order.

    An expert that is wider than what is left is the one that loses the rest, and ends the visit.
    """
    whole: list[int] = []
    for expert in order:
        if widths[expert] > budget:
            return Cut(tuple(whole), expert if budget else None, budget)
        whole.append(expert)
        budget -= widths[expert]
    return Cut(tuple(whole))


class WholeExperts(MoEPruning):
    """A method that takes whole routed experts out of every block.

    A block loses exactly as many micro-experts as CAMERA-P takes at the same ratio: whole experts
    as long as they fit, and random micro-experts of one further expert for the rest.

    `form` is what becomes of a whole expert. `zeroed`: the router still sends tokens to it and it
    adds nothing to them, as in CAMERA-P. `removed`: the same outputs, with weights that are really
    gone; widths are then stored as multiples of `align`. `dropped`: the router no longer knows it,
    other experts take its tokens by the model's own rule, and its weights are really gone; only
    the rest is zeros that are still stored.
    """

    form: Form = "zeroed"
    align: int = Field(default=16, ge=1)

    def check(self, anatomy: Anatomy) -> None:
        """Refuse, too, a ratio that routed experts alone cannot give."""
        super().check(anatomy)
        budgets = (math.floor(self.share(anatomy) * b.micro_experts) for b in anatomy.moe)
        for block, budget in zip(anatomy.moe, budgets, strict=True):
            if budget > sum(block.widths):
                raise UserError(
                    f"ratio={self.ratio} asks {budget} micro-experts of {block.name}, but its "
                    f"routed experts have {sum(block.widths)}"
                )
            if self.form == "dropped":
                check_router(block)
                self._check_enough_stay(block, budget)

    def _check_enough_stay(self, block: MoEBlock, budget: int) -> None:
        """Refuse to leave fewer experts than a token goes to; no choice may do that."""
        narrow_first = sorted(range(block.num_experts), key=lambda expert: block.widths[expert])
        left = block.num_experts - len(cut(block.widths, narrow_first, budget).whole)
        if left < block.top_k:
            raise UserError(
                f"ratio={self.ratio} leaves {left} of {block.num_experts} experts in {block.name}, "
                f"but a token goes to {block.top_k}: use a lower ratio or form=zeroed"
            )

    def carry_out(
        self, block: MoEBlock, chosen: Cut, anatomy: Anatomy, seed: int
    ) -> dict[str, Any]:
        """Take out of one block what was chosen and say what that was."""
        whole, rest = _places(block, chosen.whole), _some(block, chosen, seed)
        further = {"expert": chosen.further, "removed": chosen.rest}
        layer: dict[str, Any] = {
            "layer": block.layer,
            "removed": len(whole) + len(rest),
            **census(block, _indices(whole + rest)),
            "whole_experts": sorted(chosen.whole),
            "partial_expert": further if rest else None,
        }
        if self.form == "dropped":
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
        """Return the report of all blocks, given the anatomy that the model had before."""
        removed = [layer["removed"] for layer in layers]
        zeroed = [layer.get("zeroed_micro_experts", 0) for layer in layers]
        if self.form == "dropped":
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
        return MethodReport("zeroed" if removed == zeroed else "removed", details)


def _indices(places: Sequence[int]) -> Tensor:
    return torch.tensor(sorted(places), dtype=torch.int64)


def _places(block: MoEBlock, experts: Sequence[int]) -> list[int]:
    """Return the flat indices of all micro-experts of some experts."""
    places = dict(spans(block))
    return [i for e in experts for i in range(places[e].start, places[e].stop)]


def _some(block: MoEBlock, chosen: Cut, seed: int) -> list[int]:
    """Draw the micro-experts that the further expert loses; other blocks do not matter."""
    if chosen.further is None:
        return []
    rng = random.Random(f"{seed}:{block.name}")
    return rng.sample(_places(block, [chosen.further]), chosen.rest)
