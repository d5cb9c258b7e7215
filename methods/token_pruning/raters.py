"""Rater words: the words of a question that refer to the image (SparseVLM, ICML 2025).

Shapes: B samples, N visual rows, T text rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def raters(
    visual_BND: Tensor, visual_valid_BN: Tensor, text_BTD: Tensor, question_BT: Tensor
) -> Tensor:
    """Mark the question's tokens that are at least as similar to the image as the average, [B, T].

    The similarity of a word is the mean over visual tokens of softmax(H_v H_qᵀ), where the softmax
    is over the question's words.
    """
    product_BNT = visual_BND.float() @ text_BTD.float().transpose(1, 2)
    share_BNT = product_BNT.masked_fill(~question_BT[:, None, :], -torch.inf).softmax(dim=-1)
    # A sample without words after its image is a softmax over nothing, NaN: it has no raters.
    share_BNT = share_BNT.nan_to_num(0) * visual_valid_BN[:, :, None]
    mean_BT = share_BNT.sum(dim=1) / visual_valid_BN.sum(dim=1, keepdim=True).clamp(min=1)
    average_B1 = 1 / question_BT.sum(dim=1, keepdim=True).clamp(min=1)
    # The average of a softmax over w words is 1 / w. Without the tolerance rounding could exclude a
    # single word, which is exactly average, and leave the sample without raters.
    return question_BT & (mean_BT >= average_B1 - 1e-6)
