"""Micro-experts of a MoE block in one flat order, and their removal.

The order is that of the official CAMERA code: shared experts first, then expert by expert; N
micro-experts per block. Every micro-expert has the same 3·D weights, so shares of micro-experts are
shares of parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from bench.models.anatomy import ExpertView, MoEBlock
from bench.models.model import Model
from bench.models.slicing import keep_routed, keep_shared

SHARED = -1


def spans(block: MoEBlock) -> list[tuple[int, slice]]:
    """Return (expert, its slice of the flat order) for every expert; shared ones are `SHARED`."""
    owners = [SHARED] if block.shared is not None else []
    widths = [block.d_shared] if block.shared is not None else []
    owners += range(block.num_experts)
    widths += block.widths
    stops = list(accumulate(widths))
    starts = [stop - width for stop, width in zip(stops, widths, strict=True)]
    return [(o, slice(*ends)) for o, *ends in zip(owners, starts, stops, strict=True)]


def view(block: MoEBlock, expert: int) -> ExpertView:
    """Return a routed expert, or for `SHARED` all shared experts as one."""
    found = block.shared_view() if expert == SHARED else block.expert(expert)
    assert found is not None
    return found


def per_expert(block: MoEBlock, indices: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Translate flat indices to (expert, channels within it); untouched experts are left out."""
    # A mask, not a search per index: indices may come in any order and may be hundreds of
    # thousands.
    chosen_N = torch.zeros(block.micro_experts, dtype=torch.bool, device=indices.device)
    chosen_N[indices] = True
    for expert, place in spans(block):
        channels = chosen_N[place].nonzero().flatten()
        if len(channels):
            yield expert, channels


def census(block: MoEBlock, indices: Tensor) -> dict[str, list[Any]]:
    """Return the width of each expert and the number of chosen micro-experts, for a report.

    Experts that lose nothing are listed with 0.
    """
    width = {expert: place.stop - place.start for expert, place in spans(block)}
    lost = dict.fromkeys(width, 0)
    # Starting from zeros keeps experts that lose nothing in the report.
    lost |= {expert: len(channels) for expert, channels in per_expert(block, indices)}
    return {
        "experts": ["shared" if expert == SHARED else expert for expert in width],
        "width_per_expert": list(width.values()),
        "removed_per_expert": list(lost.values()),
    }


def zero(block: MoEBlock, indices: Tensor) -> None:
    """Set the micro-experts at flat indices to zero; shapes and router are unchanged."""
    for expert, channels in per_expert(block, indices):
        found = view(block, expert)
        found.zero(channels.to(found.gate.device))


def remove(block: MoEBlock, indices: Tensor, align: int) -> int:
    """Remove the micro-experts at flat indices from the network; return the stored padding.

    Experts whose remaining widths round up to the same multiple of `align` share a bucket; the
    padding counts the zero micro-experts that fill the buckets up. `block` is stale afterwards:
    call `Model.invalidate_structure()`.
    """
    gone = dict(per_expert(block, indices))
    # Shared experts are one dense gated module and are simply narrowed; only routed experts, whose
    # widths then differ, need ragged storage with padding.
    if SHARED in gone:
        keep_shared(block, _others(gone.pop(SHARED), block.d_shared))
    if not gone:
        return 0
    kept = {expert: _others(lost, block.widths[expert]) for expert, lost in gone.items()}
    return keep_routed(block, kept, align).padding


def restructured(model: Model) -> None:
    """Drop the model's cached structure; call it after replacing modules."""
    # `Model.anatomy` is a cached_property: its value lives in the instance dict.
    model.__dict__.pop("anatomy", None)


def _others(channels: Tensor, width: int) -> Tensor:
    # nonzero() returns ascending indices, which keeps the channel order of the original weights.
    stays = torch.ones(width, dtype=torch.bool, device=channels.device)
    stays[channels] = False
    return stays.nonzero().flatten()
