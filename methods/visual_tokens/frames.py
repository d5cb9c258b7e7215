"""The visual rows of a call packed by frame, so that every image is chosen from on its own.

Shapes: B samples, N visual rows, I frames of the call in the order of their numbers, M rows of a
frame (the most that any has), D width. Shorter frames are filled up at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.visual_tokens.windows import Cells


@dataclass(frozen=True)
class Frames:
    """Where the rows of each frame are, in raster order.

    `index_IM` are places among the B · N visual rows of the batch, `valid_IM` says which are real,
    `sample_I` which sample a frame belongs to, and `counts` how many rows each has.
    """

    index_IM: Tensor
    valid_IM: Tensor
    sample_I: Tensor
    counts: tuple[int, ...]
    shape: torch.Size

    @staticmethod
    def of(cells: Cells) -> Frames:
        """Sort the visual rows [B, N] of a batch by their frames."""
        frame_R = cells.frame_N.flatten()
        real_R = (frame_R >= 0).nonzero()[:, 0]
        real_R = real_R[frame_R[real_R].argsort(stable=True)]
        _, counts_I = torch.unique_consecutive(frame_R[real_R], return_counts=True)
        counts = tuple(counts_I.tolist())
        place_M = torch.arange(max(counts), device=frame_R.device)
        valid_IM = place_M < counts_I[:, None]
        start_I = counts_I.cumsum(0) - counts_I
        index_IM = real_R[torch.where(valid_IM, start_I[:, None] + place_M, 0)]
        sample_I = index_IM[:, 0] // cells.frame_N.shape[1]
        return Frames(index_IM, valid_IM, sample_I, counts, cells.frame_N.shape)

    def pack(self, x_BN: Tensor) -> Tensor:
        """Return values of visual rows [B, N, ...] by frame, [I, M, ...]."""
        return x_BN.flatten(0, 1)[self.index_IM]

    def spread(self, chosen_IM: Tensor) -> Tensor:
        """Return which visual rows are marked, bool [B, N]."""
        marks_R = torch.zeros(self.shape.numel(), dtype=torch.bool, device=chosen_IM.device)
        marks_R[self.index_IM[chosen_IM & self.valid_IM]] = True
        return marks_R.view(self.shape)

    def put(self, x_BND: Tensor, changed_IM: Tensor, states_IMD: Tensor) -> Tensor:
        """Return visual rows with the marked ones of each frame replaced, [B, N, D]."""
        marked_IM = changed_IM & self.valid_IM
        flat_RD = x_BND.flatten(0, 1).clone()
        flat_RD[self.index_IM[marked_IM]] = states_IMD[marked_IM].to(x_BND.dtype)
        return flat_RD.view_as(x_BND)
