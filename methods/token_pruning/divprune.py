"""DivPrune (Alvar et al., CVPR 2025): keep the tokens that are farthest from each other."""

from __future__ import annotations

from torch import Tensor

from methods.token_pruning.farthest import farthest_points
from methods.token_pruning.pruning import BeforeDecoder
from methods.visual_tokens.sight import Choice, Sight
from methods.visual_tokens.sizes import Sizes


class DivPrune(BeforeDecoder):
    """Choose projected tokens greedily by the largest distance to the nearest chosen one."""

    def _choose(self, sight: Sight, keep_I: Tensor) -> Choice:
        return Choice(farthest_points(sight.states_IMD, sight.valid, keep_I))

    def _macs(self, sizes: Sizes) -> float:
        return sizes.pairs * sizes.width
