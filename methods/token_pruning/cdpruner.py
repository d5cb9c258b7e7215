"""CDPruner (NeurIPS 2025): a determinantal point process conditioned on the question.

Shapes: I frames, M tokens of a frame, B samples, T text rows, D width, S greedy steps.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from methods.token_pruning.base import BeforeDecoder, pairwise_cosine
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import SelectionSizes


class CDPruner(BeforeDecoder):
    """Choose projected tokens with a determinantal point process conditioned on the question.

    The official LLaVA code computes relevance with CLIP's text encoder, which LLaVA, InternVL and
    Qwen-VL checkpoints do not contain. The substitute, `relevance=projected`, is the cosine between
    each projected token and the mean embedding of the words after the image, in the decoder's
    embedding space. It is not the paper's measure, so results are not comparable with the paper's.
    `relevance=none` gives every token the same relevance, so that only diversity counts.
    """

    label: ClassVar[str] = "cdpruner"

    relevance: Literal["projected", "none"] = "projected"

    def _choose(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        x_IMD, valid_IM = inputs.states_IMD, inputs.valid
        relevance_IM = torch.ones_like(valid_IM, dtype=torch.float32)
        if self.relevance == "projected":
            question_BT1 = inputs.require_question_rows()[..., None]
            # The mean over question rows only; padded rows hold copies of other rows.
            words_BD = (inputs.text_BTD.float() * question_BT1).sum(dim=1) / question_BT1.sum(dim=1)
            words_I1D = words_BD[inputs.frames.sample_I][:, None]
            similarity_IM = functional.cosine_similarity(x_IMD.float(), words_I1D, dim=-1)
            relevance_IM = normalized_relevance(similarity_IM, valid_IM)
        return TokenSelection(greedy_dpp_map(x_IMD, relevance_IM, valid_IM, keep_I))

    def _macs(self, sizes: SelectionSizes) -> float:
        steps = max(sizes.kept)
        # Step s of the greedy MAP multiplies the s earlier Cholesky rows with all M tokens: the sum
        # over s of s M is k (k - 1) / 2 · M per frame.
        factors = len(sizes.counts) * max(sizes.counts) * steps * (steps - 1) / 2
        return sizes.pairs * sizes.width + factors


# Lower bound of a squared pivot, which is 0, or negative by rounding, once the chosen tokens span
# the remaining ones, at the latest when more tokens are kept than the width.
MIN_PIVOT = 1e-10


def normalized_relevance(similarity_IM: Tensor, valid_IM: Tensor) -> Tensor:
    """Rescale similarities to [0, 1] over each frame, [I, M]; 1 where all are equal."""
    low_I1 = similarity_IM.masked_fill(~valid_IM, torch.inf).amin(dim=1, keepdim=True)
    high_I1 = similarity_IM.masked_fill(~valid_IM, -torch.inf).amax(dim=1, keepdim=True)
    span_I1 = high_I1 - low_I1
    stretched_IM = (similarity_IM - low_I1 + 1e-6) / span_I1.clamp_min(1e-6)
    return torch.where(span_I1 > 0, stretched_IM, 1.0)


def greedy_dpp_map(x_IMD: Tensor, relevance_IM: Tensor, valid_IM: Tensor, keep_I: Tensor) -> Tensor:
    """Choose likely tokens under a DPP with the kernel diag(r) cos diag(r), bool [I, M].

    This is greedy MAP inference: each step adds the token that increases the determinant of the
    kernel of the chosen tokens most. The gain is the square of the Cholesky pivot, which is updated
    for all tokens at every step (Chen et al., NeurIPS 2018), in O(k² M) overall.
    """
    kernel_IMM = relevance_IM[:, :, None] * pairwise_cosine(x_IMD) * relevance_IM[:, None, :]
    gain_IM = kernel_IMM.diagonal(dim1=1, dim2=2).clone()
    steps = int(keep_I.max())
    factor_ISM = gain_IM.new_zeros(len(x_IMD), steps, x_IMD.shape[1])
    chosen_IM = torch.zeros_like(valid_IM)
    frame_I = torch.arange(len(x_IMD), device=x_IMD.device)
    for step in range(steps):
        open_IM = gain_IM.masked_fill(~valid_IM | chosen_IM, -torch.inf)
        next_I = open_IM.argmax(dim=1)
        pivot_I1 = gain_IM[frame_I, next_I].clamp_min(MIN_PIVOT).sqrt()[:, None]
        # One step of an incremental Cholesky factorisation: row = (L[next] - Σ earlier rows) /
        # pivot. Subtracting its square leaves, for every token, the gain of choosing it next.
        known_IS = factor_ISM[frame_I, :step, next_I]
        seen_IM = torch.einsum("is,ism->im", known_IS, factor_ISM[:, :step])
        row_IM = (kernel_IMM[frame_I, next_I] - seen_IM) / pivot_I1
        factor_ISM[:, step] = row_IM
        gain_IM = gain_IM - row_IM.square()
        chosen_IM[frame_I, next_I] |= step < keep_I
    return chosen_IM
