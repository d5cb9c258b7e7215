"""Visual tokens as cells of frames: the frame that each belongs to, and its row and column.

A frame is one rectangle of visual tokens in raster order: a whole image (LLaVA, Qwen2-VL), one tile
of it (InternVL), or one time step of a video. Shapes: B rows of a batch, S tokens of one call's
sequence, V all visual tokens of the call in reading order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from bench.errors import UserError

Frame = tuple[int, int]  # rows, columns of visual tokens


@dataclass(frozen=True)
class VisualTokens:
    """Positions of the visual tokens of one call; all three are int64 of shape [B, S].

    `frame_BS` numbers the frames of the call and is -1 where a token is text or padding; `row_BS`
    and `column_BS` are a token's position inside its frame.
    """

    frame_BS: Tensor
    row_BS: Tensor
    column_BS: Tensor

    @property
    def mask(self) -> Tensor:
        """Visual tokens, bool [B, S]."""
        return self.frame_BS >= 0


def place(mask_BS: Tensor, frames: Sequence[Frame], first: int = 0) -> VisualTokens:
    """Assign frames to the marked tokens in reading order; numbers start at `first`.

    Raises:
        UserError: the frames do not fill the marked tokens exactly, or one would span two rows of
            the batch, as after cutting a prompt into chunks.
    """
    areas = [rows * columns for rows, columns in frames]
    counts = mask_BS.sum(dim=1).tolist()
    # Cumulative counts after each row must be frame boundaries: otherwise a frame would begin in
    # one prompt and end in the next. 0 stands for leading prompts without an image.
    if sum(areas) != sum(counts) or not set(accumulate(counts)) <= {0, *accumulate(areas)}:
        raise UserError(
            f"the images of this call have {sum(areas)} visual tokens in {len(frames)} frames, but "
            f"its prompts have {counts} image tokens: an image must be in one prompt and one chunk"
        )
    device = mask_BS.device
    area_F = torch.tensor(areas, dtype=torch.int64, device=device)
    width_F = torch.tensor([columns for _, columns in frames], dtype=torch.int64, device=device)
    frame_V = torch.repeat_interleave(torch.arange(len(areas), device=device), area_F)
    # Index within the frame: running index minus the first index of its frame. No loop over frames,
    # so that one call costs a few kernels however many images it has.
    inside_V = torch.arange(sum(areas), device=device) - (area_F.cumsum(0) - area_F)[frame_V]
    width_V = width_F[frame_V]
    return VisualTokens(
        frame_BS=_spread(mask_BS, frame_V + first, -1),
        row_BS=_spread(mask_BS, inside_V // width_V, 0),
        column_BS=_spread(mask_BS, inside_V % width_V, 0),
    )


def join(first: VisualTokens, second: VisualTokens) -> VisualTokens:
    """Merge two sets of visual tokens, which must mark different tokens of the same sequences."""
    keep_BS = first.mask
    return VisualTokens(
        frame_BS=torch.where(keep_BS, first.frame_BS, second.frame_BS),
        row_BS=torch.where(keep_BS, first.row_BS, second.row_BS),
        column_BS=torch.where(keep_BS, first.column_BS, second.column_BS),
    )


def _spread(mask_BS: Tensor, value_V: Tensor, elsewhere: int) -> Tensor:
    """Scatter values to the marked positions in reading order, `elsewhere` to all others."""
    spread_BS = torch.full(mask_BS.shape, elsewhere, dtype=torch.int64, device=mask_BS.device)
    return spread_BS.masked_scatter(mask_BS, value_V)
