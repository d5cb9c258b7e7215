"""Top tokens of each frame, and their pairwise cosine. Shapes: I frames, M tokens of a frame."""

from __future__ import annotations

import torch
from torch import Tensor


def best(score_IM: Tensor, allowed_IM: Tensor, keep_I: Tensor) -> Tensor:
    """Mark the `keep` highest of the allowed scores of each frame, bool [I, M].

    Ties go to the earlier token.
    """
    score_IM = score_IM.masked_fill(~allowed_IM, -torch.inf)
    # `topk` takes one k for all rows, but budgets differ between frames; the argsort of an argsort
    # is each token's rank, which is compared with the frame's own budget.
    rank_IM = score_IM.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank_IM < keep_I[:, None]) & allowed_IM


def cosine(x_IMD: Tensor) -> Tensor:
    """Return the cosine of every pair of tokens of a frame, [I, M, M], in float32."""
    unit_IMD = torch.nn.functional.normalize(x_IMD.float(), dim=-1)
    return unit_IMD @ unit_IMD.transpose(1, 2)
