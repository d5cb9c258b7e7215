"""VisionZip (CVPR 2025): keep the dominant tokens of the vision tower, and merge the others.

Shapes: I frames, M tokens of a frame, V = [I, M], H heads, d a head's width, F width of features.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from bench.models.vlm.vision_tower import TowerSizes
from methods.token_pruning.base import (
    BeforeDecoder,
    Variant,
    evenly_spaced,
    regularly_spaced,
    reproject,
    top_tokens,
)
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import SelectionSizes


class VisionZip(BeforeDecoder):
    """Keep the tokens that the class token attends to most, and merge the others into a few.

    A fraction `contextual` of `keep` (10 of 64 in the paper) are targets, chosen among the tokens
    that are not dominant. Every other token joins the target with the most similar key (averaged
    over heads), and each group is merged before the projector.

    With `variant=paper`, targets are evenly spaced, and the mean of each group replaces its target.
    With `variant=release`, every s-th token is a target, starting with the first, and becomes
    itself plus the mean of the tokens that joined it. The class token is one of the dominant tokens
    and takes the position of a removed one; with `positions=renumbered` it comes first and the
    merged tokens last. If several patches are projected to one token, the class token cannot be
    projected and is left out.

    In towers without a class token (Qwen), the attention of a token is what it receives from all
    patches on average, as in ports to Qwen2.5-VL.
    """

    label: ClassVar[str] = "visionzip"
    reads_tower: ClassVar[bool] = True

    variant: Variant = "paper"
    contextual: float = Field(default=10 / 64, ge=0, lt=1)

    def _choose(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        tower, valid_IM = inputs.require_tower_output(), inputs.valid
        release = self.variant == "release"
        with_class = release and tower.class_VF is not None
        patches_I = keep_I - int(with_class)
        targets_I = (keep_I * self.contextual).round().long().minimum(patches_I)
        dominant_IM = top_tokens(tower.received_V, valid_IM, patches_I - targets_I)
        rest_IM = valid_IM & ~dominant_IM
        spaced = regularly_spaced if release else evenly_spaced
        target_IM = spaced(rest_IM, targets_I)
        # A frame that is too small for a target has nothing to merge into.
        source_IM = torch.where((targets_I > 0)[:, None], rest_IM & ~target_IM, False)
        merged_IMF = tower.features_VF
        if bool(target_IM.any()):
            merge = add_mean_of_sources if release else merge_into_targets
            merged_IMF = merge(merged_IMF, tower.keys_VHd.mean(dim=2), target_IM, source_IM)
        place_IM = torch.arange(valid_IM.shape[1], device=valid_IM.device)
        order_IM = place_IM + valid_IM.shape[1] * target_IM
        if with_class:
            free_IM = rest_IM & ~target_IM
            class_IM = free_IM & (free_IM.cumsum(dim=1) == 1)
            merged_IMF = torch.where(class_IM[..., None], cast(Tensor, tower.class_VF), merged_IMF)
            order_IM = torch.where(class_IM, -1, order_IM)
            changed_IM = target_IM | class_IM
        else:
            changed_IM = target_IM
        if not bool(changed_IM.any()):
            return TokenSelection(dominant_IM)
        # Only changed tokens are projected again, at a cost of `targets * project`.
        states_IMD = reproject(inputs, tower, changed_IM, merged_IMF)
        return TokenSelection(
            dominant_IM | changed_IM, changed_IM, states_IMD, order_IM if release else None
        )

    def _macs(self, sizes: SelectionSizes) -> float:
        tower = cast(TowerSizes, sizes.tower)
        projected = sum(round(kept * self.contextual) for kept in sizes.kept)
        similarity = sizes.pairs * tower.keys / tower.heads if projected else 0.0
        if self.variant == "release" and tower.class_token:
            projected += len(sizes.kept)
        return tower.reading_macs + similarity + projected * tower.project


def merge_into_targets(
    x_IMD: Tensor, keys_IMd: Tensor, target_IM: Tensor, source_IM: Tensor
) -> Tensor:
    """Average each target with the source tokens assigned to it, [I, M, D].

    A source is assigned to the target whose key has the highest cosine with its own.
    """
    return _group_means(x_IMD, keys_IMd, target_IM, target_IM | source_IM)


def add_mean_of_sources(
    x_IMD: Tensor, keys_IMd: Tensor, target_IM: Tensor, source_IM: Tensor
) -> Tensor:
    """Add to each target the mean of the source tokens assigned to it, [I, M, D]."""
    means_IMD = _group_means(x_IMD, keys_IMd, target_IM, source_IM)
    return x_IMD + torch.where(target_IM[..., None], means_IMD, 0)


def _group_means(x_IMD: Tensor, keys_IMd: Tensor, target_IM: Tensor, counted_IM: Tensor) -> Tensor:
    """Average the counted tokens of each target's group, [I, M, D]; 0 where there is none."""
    unit_IMd = functional.normalize(keys_IMd.float(), dim=-1)
    similar_IMM = unit_IMd @ unit_IMd.transpose(1, 2)
    owner_IM = similar_IMM.masked_fill(~target_IM[:, None, :], -torch.inf).argmax(dim=2)
    itself_M = torch.arange(x_IMD.shape[1], device=x_IMD.device)
    owner_IM = torch.where(target_IM, itself_M, owner_IM)
    # Tokens that are not counted have an owner as well, but a weight of 0.
    weight_IM = counted_IM.to(x_IMD.dtype)
    total_IMD = torch.zeros_like(x_IMD).scatter_add(
        1, owner_IM[..., None].expand_as(x_IMD), x_IMD * weight_IM[..., None]
    )
    count_IM = torch.zeros_like(weight_IM).scatter_add(1, owner_IM, weight_IM)
    return total_IMD / count_IM.clamp(min=1)[..., None]
