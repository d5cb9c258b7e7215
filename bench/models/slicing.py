"""Physical removal of micro-experts from a MoE block: only what is kept is stored and run.

Shapes: D d_model, F an expert's width, KEPT the micro-experts that are kept.

The router is unchanged: it chooses among as many experts as before, and an expert without any
micro-expert adds zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bench.models.anatomy.expert import ExpertView
from bench.models.anatomy.gated import GatedExpert
from bench.models.anatomy.moe import MoEBlock
from bench.models.anatomy.ragged import RaggedExperts


@torch.no_grad()
def keep_routed(block: MoEBlock, kept: Mapping[int, Tensor], align: int) -> RaggedExperts:
    """Replace the routed experts by ragged ones that hold only some of their micro-experts.

    `kept` maps an expert to the indices [KEPT] to keep, ascending; experts that are not in it stay
    whole. `block` is out of date afterwards: inspect the network again.
    """
    views = [block.expert(index) for index in range(block.num_experts)]
    widths = [len(kept[e]) if e in kept else view.width for e, view in enumerate(views)]
    # All experts of a block share dtype and device.
    like = views[0].down
    ragged = RaggedExperts(
        widths, block.d_model, views[0].act, align, dtype=like.dtype, device=like.device
    )
    for expert, view in enumerate(views):
        _copy(view, ragged.view(expert), kept.get(expert))
    _replace(block.block, block.experts, ragged)
    return ragged


@torch.no_grad()
def keep_shared(block: MoEBlock, kept: Tensor) -> GatedExpert:
    """Replace the shared experts by one that holds only the micro-experts `kept` [KEPT]."""
    view = block.shared_view()
    if view is None or block.shared is None:
        raise ValueError(f"{block.name} has no shared experts")
    gated = GatedExpert(
        len(kept), block.d_model, view.act, dtype=view.down.dtype, device=view.down.device
    )
    target = ExpertView(
        gated.gate_proj.weight.detach(),
        gated.up_proj.weight.detach(),
        gated.down_proj.weight.detach(),
        view.act,
    )
    _copy(view, target, kept)
    _replace(block.block, block.shared, gated)
    return gated


def _copy(source: ExpertView, target: ExpertView, kept: Tensor | None) -> None:
    if kept is None:
        kept = torch.arange(source.width, device=source.down.device)
    # Indices may come from a ranking on the CPU.
    kept = kept.to(source.down.device)
    target.gate.copy_(source.gate.index_select(0, kept))
    target.up.copy_(source.up.index_select(0, kept))
    target.down.copy_(source.down.index_select(1, kept))


def _replace(owner: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a child module, in the same mode and without gradients."""
    name = next(name for name, child in owner.named_children() if child is old)
    setattr(owner, name, new.requires_grad_(False).train(old.training))
    # Descriptions of the block (`MoEBlock`) still refer to the old module: its memory is freed now
    # instead of when they are.
    old.to("meta")
