"""Greedy MAP of a conditional DPP (CDPruner, NeurIPS 2025). Shapes: I frames, M tokens, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.token_pruning.ranking import cosine

# Lower bound of a squared pivot. It is 0, or negative by rounding, once the chosen tokens span
# the remaining ones, which happens as soon as more tokens are kept than the width allows.
LEAST = 1e-10


def relevance(similarity_IM: Tensor, valid_IM: Tensor) -> Tensor:
    """Rescale similarities to [0, 1] over each frame, [I, M]; 1 where all are equal."""
    low_I1 = similarity_IM.masked_fill(~valid_IM, torch.inf).amin(dim=1, keepdim=True)
    high_I1 = similarity_IM.masked_fill(~valid_IM, -torch.inf).amax(dim=1, keepdim=True)
    span_I1 = high_I1 - low_I1
    stretched_IM = (similarity_IM - low_I1 + 1e-6) / span_I1.clamp_min(1e-6)
    return torch.where(span_I1 > 0, stretched_IM, 1.0)


def most_likely(x_IMD: Tensor, relevance_IM: Tensor, valid_IM: Tensor, keep_I: Tensor) -> Tensor:
    """Choose the tokens that a DPP with kernel diag(r) cos diag(r) makes likely, bool [I, M].

    Greedy: the next token raises the determinant of the kernel of the chosen ones most. Its gain is
    the square of the Cholesky pivot, which is updated for all tokens at every step (Chen et al.,
    NeurIPS 2018), O(k² M) in total.
    """
    kernel_IMM = relevance_IM[:, :, None] * cosine(x_IMD) * relevance_IM[:, None, :]
    gain_IM = kernel_IMM.diagonal(dim1=1, dim2=2).clone()
    steps = int(keep_I.max())
    factor_ISM = gain_IM.new_zeros(len(x_IMD), steps, x_IMD.shape[1])
    chosen_IM = torch.zeros_like(valid_IM)
    frame_I = torch.arange(len(x_IMD), device=x_IMD.device)
    for step in range(steps):
        open_IM = gain_IM.masked_fill(~valid_IM | chosen_IM, -torch.inf)
        next_I = open_IM.argmax(dim=1)
        pivot_I1 = gain_IM[frame_I, next_I].clamp_min(LEAST).sqrt()[:, None]
        # One step of an incremental Cholesky factorisation: row = (L[next] - Σ earlier rows) /
        # pivot. Subtracting its square leaves, for every token, the gain of choosing it next.
        known_IS = factor_ISM[frame_I, :step, next_I]
        seen_IM = torch.einsum("is,ism->im", known_IS, factor_ISM[:, :step])
        row_IM = (kernel_IMM[frame_I, next_I] - seen_IM) / pivot_I1
        factor_ISM[:, step] = row_IM
        gain_IM = gain_IM - row_IM.square()
        chosen_IM[frame_I, next_I] |= step < keep_I
    return chosen_IM
