"""FastV (Chen et al., ECCV 2024): remove tokens to which the last prompt token hardly attends."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from bench.method import Context
from methods.token_pruning.pruning import InDecoder
from methods.token_pruning.ranking import best
from methods.visual_tokens.plan import Selection
from methods.visual_tokens.sight import Choice, Sight
from methods.visual_tokens.sizes import Sizes


class FastV(InDecoder):
    """Run `after` layers (K), then keep the tokens to which the last prompt token attends most.

    The score is the mean over heads of its attention in layer K - 1. With `average`, the number of
    tokens that stay is k = (average L - K n) / (L - K).
    """

    after: int = Field(default=2, ge=1)

    def _selections(self, depth: int, context: Context) -> list[Selection]:
        quota = self._quota(self.after, depth)
        return [
            Selection("fastv", self.after, quota, self._choose, attention=True, macs=self._macs)
        ]

    def _choose(self, sight: Sight, keep_I: Tensor) -> Choice:
        score_IM = sight.attention(sight.last_text())[:, 0]
        return Choice(best(score_IM, sight.valid, keep_I))

    def _macs(self, sizes: Sizes) -> float:
        return sizes.row_macs
