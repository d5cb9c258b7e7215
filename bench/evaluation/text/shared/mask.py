"""Tree attention masks: which token sees which when a sequence holds many paths.

Tokens are laid out depth first, so the descendants of k are the positions after k and before its
`subtree_end`. Two comparisons, k <= q < subtree_end[k], therefore hold exactly for k itself and its
descendants: the ancestor mask of tree attention (SpecInfer, Miao et al. 2024; Medusa, Cai et al.
2024) without a walk through the tree.

Suffixes: B sequences, T positions (q queries, k keys), C tokens of the prefix, K = C + T keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def additive(ends_BT: Tensor, trunk: int, dtype: torch.dtype) -> Tensor:
    """Return 0 where q sees k and the lowest finite value elsewhere, [B, 1, T, C + T].

    The prefix is visible to all; k is visible to itself and to its descendants.
    """
    rows, width = ends_BT.shape
    place_T = torch.arange(width, device=ends_BT.device)
    before_TT = place_T[None, :] <= place_T[:, None]
    seen_BTT = before_TT & (place_T[:, None] < ends_BT[:, None, :])
    # The lowest finite value as in transformers' own masks, since -inf makes a fully masked row
    # NaN. The columns of the prefix stay 0.
    mask_B1TK = torch.zeros(rows, 1, width, trunk + width, dtype=dtype, device=ends_BT.device)
    mask_B1TK[:, 0, :, trunk:].masked_fill_(~seen_BTT, torch.finfo(dtype).min)
    return mask_B1TK


def blocks(ends_BT: Tensor, trunk: int) -> Any:
    """Return the same mask for FlexAttention, whose kernel skips fully masked blocks."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, width = ends_BT.shape

    def sees(row: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # For keys of the prefix, k - C is negative and would index from the end of the row, or out
        # of bounds if C > T. Both sides of `|` are evaluated for every pair, so the index is
        # clamped although its result is not used.
        own = (k - trunk).clamp(min=0)
        return (k < trunk) | ((own <= q) & (q < ends_BT[row, own]))

    return create_block_mask(sees, rows, None, width, trunk + width, device=str(ends_BT.device))


def for_network(network: Any, ends_BT: Tensor, trunk: int) -> Any:
    """Return the mask in the form that the network's attention takes."""
    if network.config._attn_implementation == "flex_attention":
        return blocks(ends_BT, trunk)
    return additive(ends_BT, trunk, network.dtype)
