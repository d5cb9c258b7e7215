"""VisionZip (Yang et al., CVPR 2025): keep dominant tokens, merge the rest into a few means."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from bench.models.multimodal.tower import TowerSizes
from methods.token_pruning.contextual import merged, spaced
from methods.token_pruning.pruning import BeforeDecoder
from methods.token_pruning.ranking import best
from methods.visual_tokens.sight import Choice, Sight
from methods.visual_tokens.sizes import Sizes


class VisionZip(BeforeDecoder):
    """Keep the tokens that the class token attends to most, and merge the others into a few.

    A fraction `contextual` of `keep` (10 of 64 in the paper) are targets, evenly spaced among the
    tokens that are not dominant; every other token joins the target whose key, averaged over heads,
    is nearest to its own. The mean of each group, taken before the projector, replaces the target.
    Qwen's towers have no class token; as in ports to Qwen2.5-VL, a token's attention is then what
    it receives from all patches on average.
    """

    reads_tower: ClassVar[bool] = True

    contextual: float = Field(default=10 / 64, ge=0, lt=1)

    def _choose(self, sight: Sight, keep_I: Tensor) -> Choice:
        tower, valid_IM = sight.tower(), sight.valid
        targets_I = (keep_I * self.contextual).round().long()
        dominant_IM = best(tower.received_V, valid_IM, keep_I - targets_I)
        rest_IM = valid_IM & ~dominant_IM
        target_IM = spaced(rest_IM, targets_I)
        if not bool(target_IM.any()):
            return Choice(dominant_IM)
        # A frame too small to have a target keeps its rest as neither target nor source; it has
        # nothing to merge into.
        source_IM = torch.where((targets_I > 0)[:, None], rest_IM & ~target_IM, False)
        keys_IMd = tower.keys_VHd.mean(dim=2)
        mean_IMF = merged(tower.features_VF, keys_IMd, target_IM, source_IM)
        # Only targets change: their means are projected again, which is the cost `targets *
        # project`.
        states_IMD = sight.states_IMD.clone()
        states_IMD[target_IM] = tower.project(mean_IMF[target_IM]).to(states_IMD.dtype)
        return Choice(dominant_IM | target_IM, target_IM, states_IMD)

    def _macs(self, sizes: Sizes) -> float:
        tower = cast(TowerSizes, sizes.tower)
        targets = sum(round(kept * self.contextual) for kept in sizes.kept)
        if not targets:
            return tower.reading
        likeness = sizes.pairs * tower.keys / tower.heads
        return tower.reading + likeness + targets * tower.project
