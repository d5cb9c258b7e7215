"""VisionZip (CVPR 2025): dominant tokens of the vision tower, and means of the others.

Shapes: I frames, M tokens of a frame, V = [I, M], H heads, d a head's width, F width of features.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from bench.models.vlm.vision_tower import TowerSizes
from methods.token_pruning.base import BeforeDecoder, evenly_spaced, reproject, top_tokens
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import SelectionSizes


class VisionZip(BeforeDecoder):
    """Keep the tokens that the class token attends to most, and merge the others into a few.

    A fraction `contextual` of `keep` (10 of 64 in the paper) are targets, evenly spaced among the
    tokens that are not dominant; every other token joins the target whose key, averaged over heads,
    is nearest to its own. The mean of each group, taken before the projector, replaces the target.
    Qwen's towers have no class token; as in ports to Qwen2.5-VL, a token's attention is then what
    it receives from all patches on average.
    """

    label: ClassVar[str] = "visionzip"
    reads_tower: ClassVar[bool] = True

    contextual: float = Field(default=10 / 64, ge=0, lt=1)

    def _choose(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        tower, valid_IM = inputs.require_tower_output(), inputs.valid
        targets_I = (keep_I * self.contextual).round().long()
        dominant_IM = top_tokens(tower.received_V, valid_IM, keep_I - targets_I)
        rest_IM = valid_IM & ~dominant_IM
        target_IM = evenly_spaced(rest_IM, targets_I)
        if not bool(target_IM.any()):
            return TokenSelection(dominant_IM)
        # A frame too small to have a target keeps its rest as neither target nor source; it has
        # nothing to merge into.
        source_IM = torch.where((targets_I > 0)[:, None], rest_IM & ~target_IM, False)
        keys_IMd = tower.keys_VHd.mean(dim=2)
        mean_IMF = merge_into_targets(tower.features_VF, keys_IMd, target_IM, source_IM)
        # Only targets change: their means are projected again, which costs `targets * project`.
        states_IMD = reproject(inputs, tower, target_IM, mean_IMF)
        return TokenSelection(dominant_IM | target_IM, target_IM, states_IMD)

    def _macs(self, sizes: SelectionSizes) -> float:
        tower = cast(TowerSizes, sizes.tower)
        targets = sum(round(kept * self.contextual) for kept in sizes.kept)
        if not targets:
            return tower.reading_macs
        similarity = sizes.pairs * tower.keys / tower.heads
        return tower.reading_macs + similarity + targets * tower.project


def merge_into_targets(
    x_IMD: Tensor, keys_IMd: Tensor, target_IM: Tensor, source_IM: Tensor
) -> Tensor:
    """Average each target with the source tokens assigned to it, [I, M, D].

    A source is assigned to the target whose key has the highest cosine with its own.
    """
    unit_IMd = functional.normalize(keys_IMd.float(), dim=-1)
    similar_IMM = unit_IMd @ unit_IMd.transpose(1, 2)
    owner_IM = similar_IMM.masked_fill(~target_IM[:, None, :], -torch.inf).argmax(dim=2)
    itself_M = torch.arange(x_IMD.shape[1], device=x_IMD.device)
    owner_IM = torch.where(target_IM, itself_M, owner_IM)
    # Tokens that are neither target nor source also find an owner; their weight of 0 keeps them out
    # of the sums.
    weight_IM = (target_IM | source_IM).to(x_IMD.dtype)
    total_IMD = torch.zeros_like(x_IMD).scatter_add(
        1, owner_IM[..., None].expand_as(x_IMD), x_IMD * weight_IM[..., None]
    )
    count_IM = torch.zeros_like(weight_IM).scatter_add(1, owner_IM, weight_IM)
    return total_IMD / count_IM.clamp(min=1)[..., None]
