"""Dominant and contextual tokens (VisionZip, CVPR 2025). Shapes: I frames, M tokens, D width."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def spaced(allowed_IM: Tensor, count_I: Tensor) -> Tensor:
    """Mark `count` allowed tokens of each frame at even distances, bool [I, M].

    Of n allowed tokens in order, these are the ones at ⌊j n / count⌋ for j from 0 to count - 1.
    """
    n_I1, count_I1 = allowed_IM.sum(dim=1, keepdim=True), count_I[:, None]
    order_IM = allowed_IM.cumsum(dim=1) - 1
    # Solved per token instead of listing positions, since `count` differs between frames: token i
    # is taken if some j has ⌊j n / count⌋ = i, and the only candidate is j = ⌈i count / n⌉. Integer
    # arithmetic throughout, because a rounded quotient would drop or duplicate a token.
    j_IM = -((-order_IM * count_I1) // n_I1.clamp(min=1))
    taken_IM = (j_IM * n_I1 // count_I1.clamp(min=1) == order_IM) & (j_IM < count_I1)
    return taken_IM & allowed_IM


def merged(x_IMD: Tensor, keys_IMd: Tensor, target_IM: Tensor, source_IM: Tensor) -> Tensor:
    """Average each target with the source tokens assigned to it, [I, M, D].

    A source is assigned to the target whose key has the highest cosine with its own.
    """
    unit_IMd = functional.normalize(keys_IMd.float(), dim=-1)
    similar_IMM = unit_IMd @ unit_IMd.transpose(1, 2)
    owner_IM = similar_IMM.masked_fill(~target_IM[:, None, :], -torch.inf).argmax(dim=2)
    itself_M = torch.arange(x_IMD.shape[1], device=x_IMD.device)
    owner_IM = torch.where(target_IM, itself_M, owner_IM)
    # Tokens that are neither target nor source also find an owner; their weight of 0 keeps them out
    # of the sums.
    weight_IM = (target_IM | source_IM).to(x_IMD.dtype)
    total_IMD = torch.zeros_like(x_IMD).scatter_add(
        1, owner_IM[..., None].expand_as(x_IMD), x_IMD * weight_IM[..., None]
    )
    count_IM = torch.zeros_like(weight_IM).scatter_add(1, owner_IM, weight_IM)
    return total_IMD / count_IM.clamp(min=1)[..., None]
