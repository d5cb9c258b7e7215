"""Which token sees which, when a row holds many paths.

Suffixes: B rows, T places of a row (q that looks, k that is looked at), C tokens of the trunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def additive(ends_BT: Tensor, trunk: int, dtype: torch.dtype) -> Tensor:
    """Return 0 where q sees k and the least number elsewhere, [B, 1, T, C + T].

    The trunk is seen by all; k by itself and by what follows up to its end.
    """
    rows, width = ends_BT.shape
    place_T = torch.arange(width, device=ends_BT.device)
    before_TT = place_T[None, :] <= place_T[:, None]
    seen_BTT = before_TT & (place_T[:, None] < ends_BT[:, None, :])
    mask_B1TK = torch.zeros(rows, 1, width, trunk + width, dtype=dtype, device=ends_BT.device)
    mask_B1TK[:, 0, :, trunk:].masked_fill_(~seen_BTT, torch.finfo(dtype).min)
    return mask_B1TK


def blocks(ends_BT: Tensor, trunk: int) -> Any:
    """Return the same for FlexAttention, whose kernel skips blocks that nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, width = ends_BT.shape

    def sees(row: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (k - trunk).clamp(min=0)
        return (k < trunk) | ((own <= q) & (q < ends_BT[row, own]))

    return create_block_mask(sees, rows, None, width, trunk + width, device=str(ends_BT.device))


def for_network(network: Any, ends_BT: Tensor, trunk: int) -> Any:
    """Return the mask in the form that a network's attention takes."""
    if network.config._attn_implementation == "flex_attention":
        return blocks(ends_BT, trunk)
    return additive(ends_BT, trunk, network.dtype)
