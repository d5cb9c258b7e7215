"""CDPruner (Zhang et al., NeurIPS 2025): diverse tokens that matter to the question."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from methods.token_pruning.determinantal import most_likely, relevance
from methods.token_pruning.pruning import BeforeDecoder
from methods.visual_tokens.sight import Choice, Sight
from methods.visual_tokens.sizes import Sizes


class CDPruner(BeforeDecoder):
    """Choose projected tokens by a determinantal point process conditioned on the question.

    The official LLaVA code takes relevance from CLIP's text encoder, which is not part of a
    LLaVA, InternVL or Qwen-VL checkpoint. The substitute here, `relevance=projected`, is the cosine
    of each projected token with the mean embedding of the words after the image, in the decoder's
    embedding space; it is not the paper's measure, and its results are not the paper's.
    `relevance=none` finds every token equally relevant, which leaves diversity alone.
    """

    relevance: Literal["projected", "none"] = "projected"

    def _choose(self, sight: Sight, keep_I: Tensor) -> Choice:
        x_IMD, valid_IM = sight.states_IMD, sight.valid
        relevance_IM = torch.ones_like(valid_IM, dtype=torch.float32)
        if self.relevance == "projected":
            question_BT1 = sight.asked()[..., None]
            words_BD = (sight.text_BTD.float() * question_BT1).sum(dim=1) / question_BT1.sum(dim=1)
            words_I1D = words_BD[sight.frames.sample_I][:, None]
            similarity_IM = functional.cosine_similarity(x_IMD.float(), words_I1D, dim=-1)
            relevance_IM = relevance(similarity_IM, valid_IM)
        return Choice(most_likely(x_IMD, relevance_IM, valid_IM, keep_I))

    def _macs(self, sizes: Sizes) -> float:
        steps = max(sizes.kept)
        factors = len(sizes.counts) * max(sizes.counts) * steps * (steps - 1) / 2
        return sizes.pairs * sizes.width + factors
