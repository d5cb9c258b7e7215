"""The micro-experts of a MoE block in one flat order: shared ones first, then expert by expert.

It is the order of the official CAMERA code; N micro-experts a block. Every micro-expert has the
same 3·D weights, so shares of micro-experts are shares of parameters.
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
    """Return (expert, its place in the flat order) for all experts; shared ones are `SHARED`."""
    owners = [SHARED] if block.shared is not None else []
    widths = [block.d_shared] if block.shared is not None else []
    owners += range(block.num_experts)
    widths += block.widths
    stops = list(accumulate(widths))
    starts = [stop - width for stop, width in zip(stops, widths, strict=True)]
    return [(o, slice(*ends)) for o, *ends in zip(owners, starts, stops, strict=True)]


def view(block: MoEBlock, expert: int) -> ExpertView:
    """Return a routed expert, or all shared ones together for `SHARED`."""
    found = block.shared_view() if expert == SHARED else block.expert(expert)
    assert found is not None
    return found


def per_expert(block: MoEBlock, indices: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Translate flat indices to (expert, channels within it), leaving out untouched experts."""
    chosen_N = torch.zeros(block.micro_experts, dtype=torch.bool, device=indices.device)
    chosen_N[indices] = True
    for expert, place in spans(block):
        channels = chosen_N[place].nonzero().flatten()
        if len(channels):
            yield expert, channels


def census(block: MoEBlock, indices: Tensor) -> dict[str, list[Any]]:
    """Return for a report, expert by expert, how wide each is and how much of it is chosen."""
    width = {expert: place.stop - place.start for expert, place in spans(block)}
    lost = dict.fromkeys(width, 0)
    lost |= {expert: len(channels) for expert, channels in per_expert(block, indices)}
    return {
        "experts": ["shared" if expert == SHARED else expert for expert in width],
        "width_per_expert": list(width.values()),
        "removed_per_expert": list(lost.values()),
    }


def zero(block: MoEBlock, indices: Tensor) -> None:
    """Set the micro-experts at flat indices to zero; shapes and the router stay as they are."""
    for expert, channels in per_expert(block, indices):
        found = view(block, expert)
        found.zero(channels.to(found.gate.device))


def remove(block: MoEBlock, indices: Tensor, align: int) -> int:
    """Take the micro-experts at flat indices out of the network; return the padding that is stored.

    What stays lies in buckets of experts whose widths round up to the same multiple of `align`;
    padding counts the micro-experts of zeros that fill them up. The block's description is out of
    date afterwards: call `restructured` on the model.
    """
    gone = dict(per_expert(block, indices))
    if SHARED in gone:
        keep_shared(block, _others(gone.pop(SHARED), block.d_shared))
    if not gone:
        return 0
    kept = {expert: _others(lost, block.widths[expert]) for expert, lost in gone.items()}
    return keep_routed(block, kept, align).padding


def restructured(model: Model) -> None:
    """Let the model look at its network anew, after modules of it were replaced."""
    model.__dict__.pop("anatomy", None)


def _others(channels: Tensor, width: int) -> Tensor:
    """Return the channels of an expert that are not among these, ascending."""
    stays = torch.ones(width, dtype=torch.bool, device=channels.device)
    stays[channels] = False
    return stays.nonzero().flatten()
