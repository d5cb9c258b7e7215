"""Base class of methods that remove whole routed experts, and the removal.

A dropped expert is never selected by the router, and its weights are not stored. If all blocks are
alike and no router has groups, the rows of dropped experts are removed from the routers as well,
and the network is a published architecture with fewer experts. Otherwise routers are wrapped
(`MaskedRouter`) and experts are stored as `RaggedExperts`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from bench.errors import UserError
from bench.method import Effect, LayerReport, MethodReport, WeightForm
from bench.models.model import Model
from bench.models.network import text_config
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import EXPERT_COUNT_NAMES, MoEBlock
from methods.baselines.router_masks import (
    MaskedRouter,
    check_router,
    keep_places,
    keep_router_rows,
    require_known_rule,
)
from methods.moe.micro_experts import (
    copy_to_ragged,
    delete_micro_experts,
    expert_spans,
    per_expert_counts,
    replace_child,
    zero_micro_experts,
)
from methods.moe.pruning import LayerEntry, MoEPruning, achieved_ratios

ExpertState = Literal["zeroed", "removed", "dropped"]


@dataclass(frozen=True)
class RemovedExperts:
    """Removals from one block: `whole` experts, and some micro-experts of a `partial_expert`."""

    whole: tuple[int, ...]
    partial_expert: int | None = None
    partial_count: int = 0


def select_whole_experts(
    widths: Sequence[int], order: Sequence[int], budget: int
) -> RemovedExperts:
    """Spend a budget of micro-experts on experts in the given order.

    The first expert that is wider than the remaining budget loses just that many micro-experts, and
    no later expert is considered.
    """
    whole: list[int] = []
    for expert in order:
        # Stopping here, instead of searching for a narrower expert, keeps the method's order. The
        # whole budget is spent, so that methods are compared at equal size.
        if widths[expert] > budget:
            return RemovedExperts(tuple(whole), expert if budget else None, budget)
        whole.append(expert)
        budget -= widths[expert]
    return RemovedExperts(tuple(whole))


class WholeExpertPruning(MoEPruning):
    """A method that removes whole routed experts from every block.

    A block loses exactly as many micro-experts as CAMERA-P removes at the same ratio: whole experts
    as long as they fit into the budget, and for the rest random micro-experts of one more expert.

    `state` says what happens to a removed expert:

    - `zeroed`: the router still sends tokens to it, and it contributes nothing, as in CAMERA-P.
    - `removed`: the same outputs, but its weights are not stored; widths are padded to multiples of
      `align`.
    - `dropped`: the router does not select it, tokens are routed to the remaining experts by the
      model's own rule, and its weights are not stored. Only the removed micro-experts of the
      partial expert are stored as zeros.
    """

    state: ExpertState = "zeroed"
    align: int = Field(default=16, ge=1)

    @property
    def leaves(self) -> WeightForm | None:
        """Removal makes experts of different widths; dropping removes whole experts."""
        return "ragged" if self.state == "removed" else None

    def check(self, structure: ModelStructure) -> None:
        """Also refuse a ratio that routed experts alone cannot reach."""
        super().check(structure)
        for block, budget in zip(structure.moe, self.budgets(structure), strict=True):
            if budget > sum(block.widths):
                raise UserError(
                    f"ratio={self.ratio} removes {budget} micro-experts of {block.name}, but its "
                    f"routed experts have {sum(block.widths)}: use a lower ratio"
                )
            if self.state == "dropped":
                check_router(block)
                self._check_enough_stay(block, budget)

    def _check_enough_stay(self, block: MoEBlock, budget: int) -> None:
        """Refuse a budget with which fewer than top-k experts might be left."""
        # In the worst case the narrowest experts are removed, which is the largest number of them.
        # The actual choice is known only after calibration.
        narrow_first = sorted(range(block.num_experts), key=lambda expert: block.widths[expert])
        left = block.num_experts - len(
            select_whole_experts(block.widths, narrow_first, budget).whole
        )
        if left < block.top_k:
            raise UserError(
                f"ratio={self.ratio} leaves {left} of {block.num_experts} experts in {block.name}, "
                f"but a token is routed to {block.top_k}: use a lower ratio or state=zeroed"
            )

    def remove_experts(
        self, block: MoEBlock, chosen: RemovedExperts, structure: ModelStructure, seed: int
    ) -> LayerEntry:
        """Remove the chosen experts from one block; return its report entry."""
        whole, partial = _flat_indices(block, chosen.whole), _draw_partial(block, chosen, seed)
        partial_entry = {"expert": chosen.partial_expert, "removed": chosen.partial_count}
        # Counted before anything changes, since `block` describes the original block.
        layer: LayerEntry = {
            "layer": block.layer,
            "removed": len(whole) + len(partial),
            **per_expert_counts(block, _index_tensor(whole + partial)),
            "whole_experts": sorted(chosen.whole),
            "partial_expert": partial_entry if partial else None,
        }
        if self.state == "dropped":
            # Before the drop, while flat indices still refer to the original experts.
            zero_micro_experts(block, _index_tensor(partial))
            if whole:
                check_router(block)
                require_known_rule(block)
                layer["router"] = router_mode(structure)
                drop_experts(block, chosen.whole, layer["router"])
            return layer | {"zeroed_micro_experts": len(partial)}
        if self.state == "zeroed":
            zero_micro_experts(block, _index_tensor(whole + partial))
            return layer | {"zeroed_micro_experts": len(whole) + len(partial)}
        if layer["removed"]:
            layer["padding_micro_experts"] = delete_micro_experts(
                block, _index_tensor(whole + partial), self.align
            )
        return layer

    def build_report(
        self, model: Model, structure: ModelStructure, layers: list[LayerEntry], **more: object
    ) -> MethodReport:
        """Build the report of all blocks.

        `structure` is that of the model before removal, to which the ratios refer.
        """
        removed = [layer["removed"] for layer in layers]
        zeroed = [layer.get("zeroed_micro_experts", 0) for layer in layers]
        if self.state == "dropped":
            # After all blocks, because the config has one number of experts for all layers.
            update_expert_count(model, router_mode(structure))
        elif self.state == "removed":
            model.invalidate_structure()
        details: dict[str, object] = {
            "requested": {"ratio": self.ratio, "base": self.base},
            "state": self.state,
            **achieved_ratios(structure, removed),
            "zeroed_parameters": achieved_ratios(structure, zeroed)["removed_parameters"],
            **more,
        }
        effect: Effect = "none"
        if sum(removed):
            # `removed` requires that at least one weight is not stored.
            effect = "zeroed" if removed == zeroed else "removed"
        return MethodReport(effect, details, [LayerReport(**layer) for layer in layers])


def _index_tensor(places: Sequence[int]) -> Tensor:
    return torch.tensor(sorted(places), dtype=torch.int64)


def _flat_indices(block: MoEBlock, experts: Sequence[int]) -> list[int]:
    """Return the flat indices of all micro-experts of some experts."""
    places = dict(expert_spans(block))
    return [i for e in experts for i in range(places[e].start, places[e].stop)]


def _draw_partial(block: MoEBlock, chosen: RemovedExperts, seed: int) -> list[int]:
    """Draw the micro-experts that the partial expert loses, independently for each block."""
    if chosen.partial_expert is None:
        return []
    rng = random.Random(f"{seed}:{block.name}")
    return rng.sample(_flat_indices(block, [chosen.partial_expert]), chosen.partial_count)


RouterMode = Literal["rows removed", "masked"]

# Names of the number of routed experts in modules and configs; `out_features` is a linear router.
COUNT_NAMES = (*EXPERT_COUNT_NAMES, "out_features")


def router_mode(structure: ModelStructure) -> RouterMode:
    """Return how routers are changed in a model that loses experts.

    Rows cannot be removed from a router with groups, which are equal parts by index, because
    experts would change groups; nor if blocks differ, because they would end up with different
    numbers of experts, which no published config can express.
    """
    grouped = any((getattr(block.router, "num_group", None) or 1) > 1 for block in structure.moe)
    alike = len({(block.widths, block.d_shared) for block in structure.moe}) == 1
    # Ragged experts have no published layout, whatever their widths.
    ragged = any(block.layout == "ragged" for block in structure.moe)
    # Flat experts (DBRX) share their matrices.
    flat = any(block.layout == "flat" for block in structure.moe)
    return "rows removed" if alike and not grouped and not ragged and not flat else "masked"


@torch.no_grad()
def drop_experts(block: MoEBlock, dropped: Sequence[int], mode: RouterMode) -> None:
    """Remove routed experts from a block, which must keep at least `top_k`.

    `block` is stale afterwards: call `update_expert_count` after all blocks.
    """
    kept = [expert for expert in range(block.num_experts) if expert not in set(dropped)]
    if mode == "masked":
        router = MaskedRouter(block.router, kept, block.num_experts)
        replace_child(block.block, block.router, router, free_old=False)
        views = [block.expert(expert) for expert in kept]
        experts = copy_to_ragged(views, [None] * len(views), align=1)
        replace_child(block.block, block.experts, experts)
        return
    keep_router_rows(block, kept)
    if block.layout == "fused":
        # The first axis of all weights and biases of fused experts is the expert.
        for name, _ in list(block.experts.named_parameters(recurse=False)):
            keep_places(block.experts, name, kept)
    else:
        # From the end, so that the remaining indices stay valid.
        for expert in sorted(dropped, reverse=True):
            del cast(nn.ModuleList, block.experts)[expert]
    # Modules cache the number of experts and use it for routing and loops.
    for module in (block.block, block.experts, *block.router.modules()):
        _update_counts(module, block.num_experts, len(kept))


def update_expert_count(model: Model, mode: RouterMode) -> None:
    """Update the model after all blocks have lost the same number of experts.

    This invalidates the cached structure. If router rows were removed, the config gets the new
    number of experts, so that transformers can load what `save_pretrained` writes.
    """
    # Read before the cached structure is invalidated.
    before = model.structure.moe[0].num_experts
    model.invalidate_structure()
    if mode == "rows removed":
        after = model.structure.moe[0].num_experts
        _update_counts(text_config(cast(Any, model.network)), before, after)


def _update_counts(owner: object, before: int, after: int) -> None:
    for name in COUNT_NAMES:
        if getattr(owner, name, None) == before:
            setattr(owner, name, after)
