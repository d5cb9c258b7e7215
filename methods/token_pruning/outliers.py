"""Attention outliers and token merging (PruMerge, ICCV 2025).

Shapes: I frames, M tokens of a frame, D width, E width of keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from methods.token_pruning.contextual import spaced
from methods.token_pruning.ranking import best


def outliers(attention_IM: Tensor, valid_IM: Tensor) -> Tensor:
    """Count the tokens of each frame with attention above Q3 + 1.5 (Q3 - Q1), at least 1, [I]."""
    # Padding becomes NaN so that `nanquantile` takes quartiles over the real tokens only.
    known_IM = attention_IM.float().masked_fill(~valid_IM, torch.nan)
    quarters = torch.tensor([0.25, 0.75], device=known_IM.device)
    low_I, high_I = torch.nanquantile(known_IM, quarters, dim=1)
    bound_I = high_I + 1.5 * (high_I - low_I)
    above_IM: Tensor = (attention_IM > bound_I[:, None]) & valid_IM
    return above_IM.sum(dim=1).clamp(min=1)


def with_uniform(attention_IM: Tensor, valid_IM: Tensor, keep_I: Tensor) -> Tensor:
    """Mark the outliers and, up to `keep`, evenly spaced tokens among the rest, [I, M]."""
    # With more outliers than `keep`, those with the most attention stay: budgets are exact.
    first_I = torch.minimum(outliers(attention_IM, valid_IM), keep_I)
    salient_IM = best(attention_IM, valid_IM, first_I)
    return salient_IM | spaced(valid_IM & ~salient_IM, keep_I - first_I)


def absorbing(
    x_IMD: Tensor, keys_IME: Tensor, attention_IM: Tensor, valid_IM: Tensor, neighbours: int
) -> Tensor:
    """Add to every token its nearest others, each weighted by attention, [I, M, D].

    Nearest are the `neighbours` other tokens whose keys have the highest cosine with its own.
    """
    unit_IME = functional.normalize(keys_IME.float(), dim=-1)
    similar_IMM = unit_IME @ unit_IME.transpose(1, 2)
    itself_MM = torch.eye(x_IMD.shape[1], dtype=torch.bool, device=x_IMD.device)
    possible_IMM = valid_IM[:, None, :] & ~itself_MM
    similar_IMM = similar_IMM.masked_fill(~possible_IMM, -torch.inf)
    rank_IMM = similar_IMM.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
    near_IMM = (rank_IMM < neighbours) & possible_IMM
    weight_IMM = near_IMM * attention_IM[:, None, :]
    return x_IMD + weight_IMM.to(x_IMD.dtype) @ x_IMD
