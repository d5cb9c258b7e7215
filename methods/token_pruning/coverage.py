"""Saliency times coverage (SCOPE, NeurIPS 2025). Shapes: I frames, M tokens of a frame, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.token_pruning.ranking import cosine


def covering(
    x_IMD: Tensor, saliency_IM: Tensor, valid_IM: Tensor, keep_I: Tensor, alpha: float
) -> Tensor:
    """Choose salient tokens that cover the remaining ones by similarity, bool [I, M].

    Greedy: the next token maximises Aᵥ^α Σᵤ max(sim(u, v) - C(u), 0), where C(u) is the highest
    similarity of u to a chosen token, 0 before the first choice.
    """
    # Rows u of padding are zeroed so that they need no coverage; columns v are excluded at the
    # choice.
    similarity_IMM = cosine(x_IMD).masked_fill(~valid_IM[:, :, None], 0)
    weight_IM = saliency_IM.float().pow(alpha)
    covered_IM = torch.zeros_like(weight_IM)
    chosen_IM = torch.zeros_like(valid_IM)
    frame_I = torch.arange(len(x_IMD), device=x_IMD.device)
    # Frames with different budgets share the loop: a frame that has reached its own `keep` still
    # finds a next token but no longer marks it.
    for step in range(int(keep_I.max())):
        gain_IM = (similarity_IMM - covered_IM[:, :, None]).clamp_min(0).sum(dim=1) * weight_IM
        gain_IM = gain_IM.masked_fill(~valid_IM | chosen_IM, -torch.inf)
        next_I = gain_IM.argmax(dim=1)
        chosen_IM[frame_I, next_I] |= step < keep_I
        covered_IM = torch.maximum(covered_IM, similarity_IMM[frame_I, :, next_I])
    return chosen_IM
