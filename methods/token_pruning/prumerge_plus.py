"""PruMerge+ (Shang et al., ICCV 2025): attention outliers and evenly spaced tokens, merged."""

from __future__ import annotations

from typing import ClassVar, cast

from pydantic import Field
from torch import Tensor

from bench.models.multimodal.tower import TowerSizes
from methods.token_pruning.outliers import absorbing, with_uniform
from methods.token_pruning.pruning import BeforeDecoder
from methods.visual_tokens.sight import Choice, Sight
from methods.visual_tokens.sizes import Sizes


class PruMergePlus(BeforeDecoder):
    """Keep the outliers of the class token's attention and fill `keep` up with even spacing.

    Outliers get more attention than Q3 + 1.5 (Q3 - Q1). Each token that stays then absorbs its
    `neighbours` nearest others by keys, weighted by attention, before the projector. Two
    differences from the paper: it derives the number of added tokens from the number of outliers,
    about 25 % of all in the end, while here `keep` decides, so that costs are known in advance; and
    the one token that its release appends for all pruned ones is left out, since it has no position
    in the image. Without a class token (Qwen), a token's attention is what it receives from all
    patches on average.
    """

    reads_tower: ClassVar[bool] = True

    neighbours: int = Field(default=32, ge=0)

    def _choose(self, sight: Sight, keep_I: Tensor) -> Choice:
        tower, valid_IM = sight.tower(), sight.valid
        kept_IM = with_uniform(tower.received_V, valid_IM, keep_I)
        if not self.neighbours:
            return Choice(kept_IM)
        keys_IME = tower.keys_VHd.flatten(2)
        merged_IMF = absorbing(
            tower.features_VF, keys_IME, tower.received_V, valid_IM, self.neighbours
        )
        states_IMD = sight.states_IMD.clone()
        states_IMD[kept_IM] = tower.project(merged_IMF[kept_IM]).to(states_IMD.dtype)
        return Choice(kept_IM, kept_IM, states_IMD)

    def _macs(self, sizes: Sizes) -> float:
        tower = cast(TowerSizes, sizes.tower)
        if not self.neighbours:
            return tower.reading
        merging = sizes.pairs * (tower.keys + tower.features)
        return tower.reading + merging + sum(sizes.kept) * tower.project
