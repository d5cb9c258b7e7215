"""The micro-experts of a MoE block in one flat order, and their removal (zeroed or deleted).

Shapes: D d_model, F an expert's width, N micro-experts of a block, KEPT the micro-experts that are
kept.

The flat order is that of the official CAMERA code: shared experts first, then expert by expert.
Every micro-expert has the same 3·D weights, so a fraction of the micro-experts is the same fraction
of the parameters. Removal does not change the router, which still chooses among all experts; an
expert without micro-experts outputs zero, or its output bias. A dense feed-forward counts as a
block of one expert and is narrowed in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TypedDict

import torch
from torch import Tensor, nn

from bench.models.structure.expert_view import ExpertView
from bench.models.structure.moe_block import MoEBlock
from bench.models.structure.ragged_experts import (
    GatedExpert,
    NarrowedFeedForward,
    RaggedExperts,
)

SHARED = -1


def expert_spans(block: MoEBlock) -> list[tuple[int, slice]]:
    """Return (expert, its slice of the flat order) for every expert; shared ones are `SHARED`."""
    owners = [SHARED] if block.shared is not None else []
    widths = [block.d_shared] if block.shared is not None else []
    owners += range(block.num_experts)
    widths += block.widths
    stops = list(accumulate(widths))
    starts = [stop - width for stop, width in zip(stops, widths, strict=True)]
    spans = [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]
    return list(zip(owners, spans, strict=True))


def expert_view(block: MoEBlock, expert: int) -> ExpertView:
    """Return a routed expert, or for `SHARED` all shared experts as one."""
    view = block.shared_view() if expert == SHARED else block.expert(expert)
    assert view is not None
    return view


def channels_per_expert(block: MoEBlock, indices: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Translate flat indices to (expert, channels within it); experts without any are left out."""
    # A mask instead of a search per index: there may be hundreds of thousands, in any order.
    chosen_N = torch.zeros(block.micro_experts, dtype=torch.bool, device=indices.device)
    chosen_N[indices] = True
    for expert, span in expert_spans(block):
        channels = chosen_N[span].nonzero().flatten()
        if len(channels):
            yield expert, channels


class ExpertCounts(TypedDict):
    """Entries of a block's report with one value per expert, shared ones first."""

    experts: list[int | str]
    width_per_expert: list[int]
    removed_per_expert: list[int]


def per_expert_counts(block: MoEBlock, indices: Tensor) -> ExpertCounts:
    """Return each expert's width and how many of its micro-experts the flat indices select.

    Experts that lose nothing are listed with 0.
    """
    width = {expert: span.stop - span.start for expert, span in expert_spans(block)}
    lost = dict.fromkeys(width, 0)
    lost |= {expert: len(channels) for expert, channels in channels_per_expert(block, indices)}
    return {
        "experts": ["shared" if expert == SHARED else expert for expert in width],
        "width_per_expert": list(width.values()),
        "removed_per_expert": list(lost.values()),
    }


def zero_micro_experts(block: MoEBlock, indices: Tensor) -> None:
    """Set the micro-experts at flat indices to zero; shapes and router are unchanged."""
    for expert, channels in channels_per_expert(block, indices):
        view = expert_view(block, expert)
        view.zero(channels.to(view.down.device))


def delete_micro_experts(block: MoEBlock, indices: Tensor, align: int) -> int:
    """Delete the micro-experts at flat indices from the network; return the amount of padding.

    Experts whose remaining widths round up to the same multiple of `align` are stored together,
    padded with zero micro-experts, whose number is returned. `block` is stale afterwards: call
    `Model.invalidate_structure()`.
    """
    removed = dict(channels_per_expert(block, indices))
    if block.feed_forward is not None:
        # No padding: `align` exists for grouped kernels, while a dense layer keeps the module of
        # its architecture, whose config can state any width.
        for channels in removed.values():
            block.feed_forward.narrow(complement(channels, block.d_ff))
        return 0
    # Shared experts are one dense gated module and are simply narrowed. Routed experts end up with
    # different widths, so they need ragged storage with padding.
    if SHARED in removed:
        keep_shared(block, complement(removed.pop(SHARED), block.d_shared))
    if not removed:
        return 0
    kept = {expert: complement(lost, block.widths[expert]) for expert, lost in removed.items()}
    return keep_routed(block, kept, align).padding


def complement(channels: Tensor, width: int) -> Tensor:
    """Return the indices below `width` that are not among the channels, ascending."""
    # nonzero() returns ascending indices, which keeps the channel order of the original weights.
    stays = torch.ones(width, dtype=torch.bool, device=channels.device)
    stays[channels] = False
    return stays.nonzero().flatten()


@torch.no_grad()
def keep_routed(block: MoEBlock, kept: Mapping[int, Tensor], align: int) -> RaggedExperts:
    """Replace the routed experts by ragged experts that store only the kept micro-experts.

    `kept` maps an expert to the ascending indices [KEPT] to keep; experts not listed stay whole.
    `block` is stale afterwards: call `Model.invalidate_structure()`.
    """
    views = [block.expert(index) for index in range(block.num_experts)]
    ragged = copy_to_ragged(views, [kept.get(index) for index in range(len(views))], align)
    replace_child(block.block, block.experts, ragged)
    return ragged


@torch.no_grad()
def copy_to_ragged(
    views: Sequence[ExpertView], kept: Sequence[Tensor | None], align: int
) -> RaggedExperts:
    """Copy experts of one block into ragged storage; None in `kept` keeps the whole expert."""
    widths = [
        view.width if channels is None else len(channels)
        for view, channels in zip(views, kept, strict=True)
    ]
    # All experts of a block share dtype and device.
    first = views[0]
    ragged = RaggedExperts(
        widths,
        len(first.down),
        first.act,
        align,
        dtype=first.down.dtype,
        device=first.down.device,
        gated=first.form != "plain",
        biased=first.down_bias is not None,
        gating=first.gating,
    )
    for expert, (view, channels) in enumerate(zip(views, kept, strict=True)):
        ragged.view(expert).copy_(view, channels)
    return ragged


@torch.no_grad()
def keep_shared(block: MoEBlock, kept: Tensor) -> nn.Module:
    """Narrow the shared experts to the micro-experts `kept` [KEPT]; return the new module."""
    view, shared = block.shared_view(), block.shared
    if view is None or shared is None or block.shared_owner is None:
        raise ValueError(f"{block.name} has no shared experts")
    if isinstance(shared, NarrowedFeedForward):
        shared.feed_forward.narrow(kept)
        return shared
    if view.form != "gated" or view.gating is not None:
        narrowed = NarrowedFeedForward(shared, kept)
        replace_child(block.shared_owner, shared, narrowed, free_old=False)
        return narrowed
    gated = GatedExpert(
        len(kept), block.d_model, view.act, dtype=view.down.dtype, device=view.down.device
    )
    target = ExpertView(
        gated.gate_proj.weight.detach(),
        gated.up_proj.weight.detach(),
        gated.down_proj.weight.detach(),
        view.act,
    )
    target.copy_(view, kept)
    replace_child(block.shared_owner, shared, gated)
    return gated


def replace_child(
    owner: nn.Module, old: nn.Module, new: nn.Module, *, free_old: bool = True
) -> None:
    """Replace a child module by one in the same mode and without gradients.

    `free_old=False` keeps the weights of the old module, which the new one may use.
    """
    # Found by identity: the child's name differs between architectures.
    name = next(name for name, child in owner.named_children() if child is old)
    setattr(owner, name, new.requires_grad_(False).train(old.training))
    if free_old:
        # Instances of `MoEBlock` still refer to the old module and would keep its memory alive.
        old.to("meta")
