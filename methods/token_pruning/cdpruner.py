"""CDPruner (Zhang et al., NeurIPS 2025): a diverse set of tokens relevant to the question."""

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
    """Choose projected tokens with a determinantal point process conditioned on the question.

    The official LLaVA code takes relevance from CLIP's text encoder, which LLaVA, InternVL and
    Qwen-VL checkpoints do not contain. The substitute used here, `relevance=projected`, is the
    cosine between each projected token and the mean embedding of the words after the image, in the
    decoder's embedding space. It is not the paper's measure, so results are not comparable with the
    paper's. `relevance=none` gives every token the same relevance, which leaves diversity alone.
    """

    relevance: Literal["projected", "none"] = "projected"

    def _choose(self, sight: Sight, keep_I: Tensor) -> Choice:
        x_IMD, valid_IM = sight.states_IMD, sight.valid
        relevance_IM = torch.ones_like(valid_IM, dtype=torch.float32)
        if self.relevance == "projected":
            question_BT1 = sight.asked()[..., None]
            # A mean over the question's rows alone: padded rows hold copies of other rows and must
            # not be averaged in.
            words_BD = (sight.text_BTD.float() * question_BT1).sum(dim=1) / question_BT1.sum(dim=1)
            words_I1D = words_BD[sight.frames.sample_I][:, None]
            similarity_IM = functional.cosine_similarity(x_IMD.float(), words_I1D, dim=-1)
            relevance_IM = relevance(similarity_IM, valid_IM)
        return Choice(most_likely(x_IMD, relevance_IM, valid_IM, keep_I))

    def _macs(self, sizes: Sizes) -> float:
        steps = max(sizes.kept)
        # Step s of the greedy MAP multiplies the s earlier Cholesky rows with all M tokens: the sum
        # over s of s M is k (k - 1) / 2 · M per frame.
        factors = len(sizes.counts) * max(sizes.counts) * steps * (steps - 1) / 2
        return sizes.pairs * sizes.width + factors
