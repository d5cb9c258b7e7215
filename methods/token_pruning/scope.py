"""SCOPE (NeurIPS 2025): saliency times coverage.

Shapes: I frames, M tokens of a frame, V = [I, M], D or F width.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from bench.models.vlm.vision_tower import TowerSizes
from methods.token_pruning.base import BeforeDecoder, pairwise_cosine
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import SelectionSizes


class SCOPE(BeforeDecoder):
    """Choose tokens greedily by saliency to the power `alpha` times the coverage that they add.

    Saliency is the class token's attention, or in towers without one (Qwen) the attention that a
    token receives from all patches on average. Coverage is measured by the cosine of the features
    before the projector.
    """

    label: ClassVar[str] = "scope"
    reads_tower: ClassVar[bool] = True

    alpha: float = Field(default=1.0, ge=0)

    def _choose(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        tower = inputs.require_tower_output()
        return TokenSelection(
            greedy_coverage(tower.features_VF, tower.received_V, inputs.valid, keep_I, self.alpha)
        )

    def _macs(self, sizes: SelectionSizes) -> float:
        tower = cast(TowerSizes, sizes.tower)
        return tower.reading_macs + sizes.pairs * tower.features


def greedy_coverage(
    x_IMD: Tensor, saliency_IM: Tensor, valid_IM: Tensor, keep_I: Tensor, alpha: float
) -> Tensor:
    """Choose salient tokens that cover the remaining ones by similarity, bool [I, M].

    The next token v maximises Aᵥ^α Σᵤ max(sim(u, v) - C(u), 0), where C(u) is the highest
    similarity of u to a chosen token, or 0 before the first choice.
    """
    # Zero rows u of padding need no coverage; columns v of padding are excluded below.
    similarity_IMM = pairwise_cosine(x_IMD).masked_fill(~valid_IM[:, :, None], 0)
    weight_IM = saliency_IM.float().pow(alpha)
    covered_IM = torch.zeros_like(weight_IM)
    chosen_IM = torch.zeros_like(valid_IM)
    frame_I = torch.arange(len(x_IMD), device=x_IMD.device)
    # All frames share the loop; frames that have reached their own `keep` mark no further token.
    for step in range(int(keep_I.max())):
        gain_IM = (similarity_IMM - covered_IM[:, :, None]).clamp_min(0).sum(dim=1) * weight_IM
        gain_IM = gain_IM.masked_fill(~valid_IM | chosen_IM, -torch.inf)
        next_I = gain_IM.argmax(dim=1)
        chosen_IM[frame_I, next_I] |= step < keep_I
        covered_IM = torch.maximum(covered_IM, similarity_IMM[frame_I, :, next_I])
    return chosen_IM
