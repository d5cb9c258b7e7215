"""SCOPE (NeurIPS 2025): salient tokens that cover what the chosen ones do not cover yet."""

from __future__ import annotations

from typing import ClassVar, cast

from pydantic import Field
from torch import Tensor

from bench.models.multimodal.tower import TowerSizes
from methods.token_pruning.coverage import covering
from methods.token_pruning.pruning import BeforeDecoder
from methods.visual_tokens.sight import Choice, Sight
from methods.visual_tokens.sizes import Sizes


class Scope(BeforeDecoder):
    """Choose tokens greedily by saliency to the power `alpha` times the coverage that they add.

    Saliency is the class token's attention (Qwen: the attention a token receives from all patches
    on average); coverage is measured by the cosine of the features before the projector.
    """

    reads_tower: ClassVar[bool] = True

    alpha: float = Field(default=1.0, ge=0)

    def _choose(self, sight: Sight, keep_I: Tensor) -> Choice:
        tower = sight.tower()
        return Choice(
            covering(tower.features_VF, tower.received_V, sight.valid, keep_I, self.alpha)
        )

    def _macs(self, sizes: Sizes) -> float:
        tower = cast(TowerSizes, sizes.tower)
        return tower.reading + sizes.pairs * tower.features
