"""DART (Wen et al., EMNLP 2025): tokens that duplicate a few pivots are removed."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from bench.method import Context
from methods.token_pruning.duplication import least_alike, pivots
from methods.token_pruning.pruning import InDecoder
from methods.visual_tokens.plan import Selection
from methods.visual_tokens.sight import Choice, Sight
from methods.visual_tokens.sizes import Sizes


class DART(InDecoder):
    """After `after` layers keep the tokens that are least similar to the pivots.

    Pivots are the visual tokens and the words after the image whose keys in the preceding layer
    have the largest L1 norm; similarity is the cosine of hidden states. No attention weights are
    needed.
    """

    after: int = Field(default=2, ge=1)
    visual_pivots: int = Field(default=4, ge=1)
    text_pivots: int = Field(default=4, ge=0)

    def _selections(self, depth: int, context: Context) -> list[Selection]:
        quota = self._quota(self.after, depth)
        return [Selection("dart", self.after, quota, self._choose, attention=True, macs=self._macs)]

    def _choose(self, sight: Sight, keep_I: Tensor) -> Choice:
        visual_IME, text_BTE = sight.keys()
        sample_I, question_BT = sight.frames.sample_I, sight.question()
        most_I = keep_I.clamp(max=self.visual_pivots)
        chosen_IM = pivots(visual_IME, sight.valid, most_I)
        # With fewer words than `text_pivots`, all of them become pivots.
        words_B = torch.full_like(question_BT.sum(dim=1), self.text_pivots)
        words_BT = pivots(text_BTE, question_BT, words_B)
        return Choice(
            least_alike(
                sight.states_IMD,
                sight.text_BTD[sample_I],
                sight.valid,
                chosen_IM,
                words_BT[sample_I],
                keep_I,
            )
        )

    def _macs(self, sizes: Sizes) -> float:
        # An upper bound: the question is taken to have at least `text_pivots` words.
        turns = min(max(sizes.kept), self.visual_pivots) + self.text_pivots
        return turns * len(sizes.counts) * max(sizes.counts) * sizes.width
