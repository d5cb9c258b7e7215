"""Removal of whole experts such that the router sends their tokens to the remaining ones.

Weights of dropped experts are not stored. Where all blocks are alike and no router has groups, the
experts' rows of the router are removed too, and the network is a published architecture with fewer
experts. Otherwise routers are wrapped (`MaskedRouter`) and experts are stored as `RaggedExperts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from bench.models.anatomy import Anatomy, MoEBlock
from bench.models.anatomy.ragged import RaggedExperts
from bench.models.model import Model
from methods.baselines.routing import MaskedRouter
from methods.micro_experts import restructured

RouterForm = Literal["rows removed", "masked"]
# Names of the number of routed experts in modules and configs; `out_features` is a linear router.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "out_features")


def router_form(anatomy: Anatomy) -> RouterForm:
    """Return how routers are changed in a model that loses experts.

    A router with groups splits its experts into equal parts by index, so removing rows would move
    experts between groups. Blocks that differ would end up with different numbers of experts, which
    no published config can express.
    """
    grouped = any((getattr(block.router, "num_group", None) or 1) > 1 for block in anatomy.moe)
    alike = len({(block.widths, block.d_shared) for block in anatomy.moe}) == 1
    # Ragged experts have no published layout to fall back to, whatever their widths.
    ragged = any(block.layout == "ragged" for block in anatomy.moe)
    return "rows removed" if alike and not grouped and not ragged else "masked"


@torch.no_grad()
def drop(block: MoEBlock, dropped: Sequence[int], form: RouterForm) -> None:
    """Remove routed experts from a block, of which at least `top_k` must stay.

    `block` is stale afterwards: call `settle` when all blocks are done.
    """
    kept = [expert for expert in range(block.num_experts) if expert not in set(dropped)]
    if form == "masked":
        _put(block.block, block.router, MaskedRouter(block.router, kept))
        _put(block.block, block.experts, _only(block, kept))
        return
    tensors = (*block.router.named_parameters(), *block.router.named_buffers())
    for name, tensor in tensors:
        # Buffers too: DeepSeek-V3's score correction bias has one value per expert.
        if tensor.shape[0] == block.num_experts:
            _keep_rows(block.router, name, kept)
    if block.layout == "fused":
        for name in ("gate_up_proj", "down_proj"):
            _keep_rows(block.experts, name, kept)
    else:
        # From the end, so that the remaining indices stay valid.
        for expert in sorted(dropped, reverse=True):
            del cast(nn.ModuleList, block.experts)[expert]
    # Modules cache the count that they were built with, and route or loop by it.
    for module in (block.block, block.experts, block.router):
        _recount(module, block.num_experts, len(kept))


def settle(model: Model, form: RouterForm) -> None:
    """Update the model after all blocks have lost the same number of experts.

    Its cached structure is invalidated. Where router rows were removed, the config gets the new
    expert count, so stock transformers can load what `save_pretrained` writes.
    """
    # Read before the cached structure is invalidated.
    before = model.anatomy.moe[0].num_experts
    restructured(model)
    if form == "rows removed":
        after = model.anatomy.moe[0].num_experts
        _recount(cast(Any, model.network).config, before, after)


def _only(block: MoEBlock, kept: Sequence[int]) -> RaggedExperts:
    """Store the kept experts of a block as `RaggedExperts` without padding."""
    views = [block.expert(expert) for expert in kept]
    like, widths = views[0].down, [view.width for view in views]
    made = RaggedExperts(
        widths, block.d_model, views[0].act, align=1, dtype=like.dtype, device=like.device
    )
    for place, source in enumerate(views):
        target = made.view(place)
        target.gate.copy_(source.gate)
        target.up.copy_(source.up)
        target.down.copy_(source.down)
    return made


def _put(owner: nn.Module, old: nn.Module, new: nn.Module) -> None:
    # Found by identity: the child's name differs between architectures.
    name = next(name for name, child in owner.named_children() if child is old)
    setattr(owner, name, new.requires_grad_(False).train(old.training))


def _keep_rows(module: nn.Module, name: str, kept: Sequence[int]) -> None:
    """Reduce a parameter or buffer to the rows of the kept experts."""
    tensor: Tensor = getattr(module, name)
    rows = tensor.detach()[list(kept)].clone()
    if isinstance(tensor, nn.Parameter):
        rows = nn.Parameter(rows, requires_grad=tensor.requires_grad)
    setattr(module, name, rows)


def _recount(owner: object, before: int, after: int) -> None:
    for name in COUNTS:
        if getattr(owner, name, None) == before:
            setattr(owner, name, after)
