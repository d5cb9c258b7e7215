"""DART (EMNLP 2025): remove tokens that duplicate a few pivots.

Shapes: I frames, M tokens of a frame, T text rows, P pivots, D width, E width of keys.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from bench.method import Context
from methods.token_pruning.base import InDecoder, Variant, top_tokens
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import SelectionSizes, TokenPruningStep


class DART(InDecoder):
    """After `after` layers, keep the tokens that are least similar to the pivots.

    Pivots are the visual tokens and the words after the image whose keys in the preceding layer
    have the largest L1 norm; similarity is the cosine of hidden states. No attention weights are
    needed. `variant=paper` keeps exactly `keep` tokens. `variant=release` compares states after the
    decoder's final norm, and each of P pivots takes ⌊keep / P⌋ tokens in addition to the visual
    pivots: with `keep=128`, 132 tokens are kept.
    """

    label: ClassVar[str] = "dart"

    variant: Variant = "paper"
    after: int = Field(default=2, ge=1)
    visual_pivots: int = Field(default=4, ge=1)
    text_pivots: int = Field(default=4, ge=0)

    def _steps(self, depth: int, context: Context) -> list[TokenPruningStep]:
        quota = self._quota(self.after, depth)
        if self.variant == "release":
            turns = self.visual_pivots + self.text_pivots
            quota = replace(quota, turns=turns, pivots=self.visual_pivots)
        return [
            TokenPruningStep(
                self.label, self.after, quota, self._choose, attention=True, macs=self._macs
            )
        ]

    def _choose(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        visual_IME, text_BTE = inputs.keys()
        sample_I, question_BT = inputs.frames.sample_I, inputs.question_rows()
        most_I = keep_I.clamp(max=self.visual_pivots)
        chosen_IM = select_pivots(visual_IME, inputs.valid, most_I)
        # With fewer words than `text_pivots`, all of them become pivots.
        words_B = torch.full_like(question_BT.sum(dim=1), self.text_pivots)
        words_BT = select_pivots(text_BTE, question_BT, words_B)
        states_IMD, text_BTD = inputs.states_IMD, inputs.text_BTD
        if self.variant == "release":
            norm = inputs.ahead.final_norm
            states_IMD, text_BTD = norm(states_IMD), norm(text_BTD)
        return TokenSelection(
            least_similar_to_pivots(
                states_IMD,
                text_BTD[sample_I],
                inputs.valid,
                chosen_IM,
                words_BT[sample_I],
                keep_I,
            )
        )

    def _macs(self, sizes: SelectionSizes) -> float:
        # An upper bound, which assumes that the question has at least `text_pivots` words.
        turns = min(max(sizes.kept), self.visual_pivots) + self.text_pivots
        return turns * len(sizes.counts) * max(sizes.counts) * sizes.width


def select_pivots(keys_IRE: Tensor, allowed_IR: Tensor, most_I: Tensor) -> Tensor:
    """Mark the `most` rows of each frame whose keys have the largest L1 norm, bool [I, R]."""
    return top_tokens(keys_IRE.float().abs().sum(dim=-1), allowed_IR, most_I)


def least_similar_to_pivots(
    x_IMD: Tensor,
    text_ITD: Tensor,
    valid_IM: Tensor,
    visual_pivots_IM: Tensor,
    text_pivots_IT: Tensor,
    keep_I: Tensor,
) -> Tensor:
    """Choose the visual pivots and the tokens least similar to each pivot, bool [I, M].

    Pivots take turns, visual ones first, each kind in order. After the visual pivots themselves,
    `keep` is divided equally among all pivots; the first ones take one more if there is a
    remainder. Each pivot takes the remaining tokens that have the lowest cosine with it.
    """
    pivot_IP = torch.cat([visual_pivots_IM, text_pivots_IT], dim=1)
    state_IPD = functional.normalize(torch.cat([x_IMD, text_ITD], dim=1).float(), dim=-1)
    number_IP = pivot_IP.cumsum(dim=1) - 1
    count_I = pivot_IP.sum(dim=1)
    rest_I = (keep_I - visual_pivots_IM.sum(dim=1)).clamp(min=0)
    chosen_IM = visual_pivots_IM.clone()
    for turn in range(int(count_I.max())):
        # `argmax` of marks is the first marked position. A frame with fewer pivots than turns gets
        # position 0, which has no effect, because its part is 0.
        place_I = (pivot_IP & (number_IP == turn)).float().argmax(dim=1)
        pivot_ID1 = state_IPD[torch.arange(len(x_IMD), device=x_IMD.device), place_I][..., None]
        cosine_IM = (state_IPD[:, : x_IMD.shape[1]] @ pivot_ID1)[..., 0]
        part_I = rest_I // count_I.clamp(min=1) + (turn < rest_I % count_I.clamp(min=1))
        part_I = torch.where(turn < count_I, part_I, 0)
        chosen_IM |= top_tokens(-cosine_IM, valid_IM & ~chosen_IM, part_I)
    return chosen_IM
