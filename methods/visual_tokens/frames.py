"""Visual rows of a call packed by frame, so that each image is pruned separately.

Shapes: B samples, N visual rows, I frames of the call in the order of their numbers, M rows of a
frame (the maximum over frames), D width. Shorter frames are padded at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.visual_tokens.windows import Cells


@dataclass(frozen=True)
class Frames:
    """Positions of each frame's rows, in raster order.

    `index_IM` are positions among the B · N visual rows of the batch, `valid_IM` marks the real
    ones, `sample_I` is the sample of each frame, and `counts` the number of its rows.
    """

    index_IM: Tensor
    valid_IM: Tensor
    sample_I: Tensor
    counts: tuple[int, ...]
    shape: torch.Size

    @staticmethod
    def of(cells: Cells) -> Frames:
        """Sort the visual rows [B, N] of a batch by frame."""
        frame_R = cells.frame_N.flatten()
        real_R = (frame_R >= 0).nonzero()[:, 0]
        # The stable sort keeps rows of a frame in sequence order, which is raster order. Frame
        # numbers are unique over the batch, so no frame mixes samples.
        real_R = real_R[frame_R[real_R].argsort(stable=True)]
        _, counts_I = torch.unique_consecutive(frame_R[real_R], return_counts=True)
        counts = tuple(counts_I.tolist())
        place_M = torch.arange(max(counts), device=frame_R.device)
        valid_IM = place_M < counts_I[:, None]
        start_I = counts_I.cumsum(0) - counts_I
        # Padding repeats row 0 of the batch: any valid index does, since `valid_IM` excludes it.
        index_IM = real_R[torch.where(valid_IM, start_I[:, None] + place_M, 0)]
        sample_I = index_IM[:, 0] // cells.frame_N.shape[1]
        return Frames(index_IM, valid_IM, sample_I, counts, cells.frame_N.shape)

    def pack(self, x_BN: Tensor) -> Tensor:
        """Return values of visual rows [B, N, ...] by frame, [I, M, ...]."""
        return x_BN.flatten(0, 1)[self.index_IM]

    def spread(self, chosen_IM: Tensor) -> Tensor:
        """Turn marks per frame into marks of visual rows, bool [B, N]."""
        marks_R = torch.zeros(self.shape.numel(), dtype=torch.bool, device=chosen_IM.device)
        marks_R[self.index_IM[chosen_IM & self.valid_IM]] = True
        return marks_R.view(self.shape)

    def put(self, x_BND: Tensor, changed_IM: Tensor, states_IMD: Tensor) -> Tensor:
        """Replace the marked rows of each frame, [B, N, D]."""
        marked_IM = changed_IM & self.valid_IM
        flat_RD = x_BND.flatten(0, 1).clone()
        flat_RD[self.index_IM[marked_IM]] = states_IMD[marked_IM].to(x_BND.dtype)
        return flat_RD.view_as(x_BND)
