"""VisPruner (Zhang et al., ICCV 2025): keep salient tokens, and diverse ones among the others.

Shapes: I frames, M tokens of a frame, R undecided tokens of one frame, F width.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from bench.models.vlm.vision_tower import TowerSizes
from methods.token_pruning.base import BeforeDecoder, top_tokens
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import SelectionSizes

# Tokens removed in one round of matching, as in the release.
ROUND = 8


class VisPruner(BeforeDecoder):
    """Keep a share `important` of `keep` by the class token's attention, the rest by diversity.

    The other tokens are sorted by decreasing attention and pruned in rounds, until as many are left
    as `keep` needs. In a round, up to eight of the tokens at even positions are removed: those most
    similar to a token at an odd position. Similarity is the cosine of the projector's inputs. The
    release's README has `important` 0.5 for 128 of 576 tokens and 0.75 for 64
    (github.com/Theia-4869/VisPruner, aefa01a).
    """

    label: ClassVar[str] = "vispruner"
    reads_tower: ClassVar[bool] = True

    important: float = Field(default=0.5, ge=0, le=1)

    def _choose(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        tower, valid_IM = inputs.require_tower_output(), inputs.valid
        salient_I = (keep_I * self.important).floor().long()
        kept_IM = top_tokens(tower.received_V, valid_IM, salient_I)
        unit_IMF = functional.normalize(tower.features_VF.float(), dim=-1)
        for frame, wanted in enumerate((keep_I - salient_I).tolist()):
            free_R = (valid_IM[frame] & ~kept_IM[frame]).nonzero()[:, 0]
            falling_R = tower.received_V[frame, free_R].argsort(descending=True, stable=True)
            left_R = drop_duplicates(free_R[falling_R], unit_IMF[frame], wanted)
            kept_IM[frame, left_R] = True
        return TokenSelection(kept_IM)

    def _macs(self, sizes: SelectionSizes) -> float:
        tower = cast(TowerSizes, sizes.tower)
        pairs = 0
        for count, kept in zip(sizes.counts, sizes.kept, strict=True):
            rest = count - int(kept * self.important)
            while rest > kept - int(kept * self.important):
                even = -(-rest // 2)
                pairs += even * (rest - even)
                rest -= min(ROUND, rest - kept + int(kept * self.important), even)
        return tower.reading_macs + pairs * tower.features


def drop_duplicates(order_R: Tensor, unit_MF: Tensor, wanted: int) -> Tensor:
    """Drop tokens that repeat others until `wanted` are left; return these.

    After a round, the remaining tokens at even positions come in order of decreasing similarity,
    followed by the tokens at odd positions. An odd number of tokens has one more at even positions.
    """
    while len(order_R) > wanted:
        even_A, odd_B = order_R[::2], order_R[1::2]
        leaving = min(ROUND, len(order_R) - wanted, len(even_A))
        # A single token has nothing to repeat, but may still be one too many.
        similar_A = (
            (unit_MF[even_A] @ unit_MF[odd_B].T).amax(dim=1)
            if len(odd_B)
            else torch.zeros(len(even_A), device=order_R.device)
        )
        staying_A = similar_A.argsort(descending=True, stable=True)[leaving:]
        order_R = torch.cat([even_A[staying_A], odd_B])
    return order_R
