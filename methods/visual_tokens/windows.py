"""Windows of visual attention on the patch grid, as masks and as bands of grid rows.

Shapes: Q visual queries, K visual keys, N visual rows of one sample.

A token at cell (r, c) attends to the cell (r', c') of the same frame if max(|r - r'|, |c - c'|) is
at most the radius; windows end at the frame's border. Frame -1 marks padding; padding rows attend
to each other, which keeps a softmax over them finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.visual_tokens.plan import Window

# Approximate number of queries per band: long enough for efficient matmuls, short enough to skip
# most keys. On 2 cores of an AMD EPYC (float32, 16 heads of 64, radius 2), 576 rows take 13.0 ms
# under one dense mask and 5.9, 4.4, 5.6, 6.4 and 9.9 ms in bands of 24, 48, 96, 192 and 384.
BAND_QUERIES = 96


@dataclass(frozen=True)
class Cells:
    """Frame, row and column of visual tokens, int64 of equal shape [..., N]."""

    frame_N: Tensor
    row_N: Tensor
    column_N: Tensor

    def part(self, chosen: slice) -> Cells:
        """Select tokens."""
        return Cells(self.frame_N[..., chosen], self.row_N[..., chosen], self.column_N[..., chosen])

    def of(self, samples: slice) -> Cells:
        """Select samples of a batch."""
        return Cells(self.frame_N[samples], self.row_N[samples], self.column_N[samples])

    def sample(self, index: int) -> Cells:
        """Return one sample's tokens, without the batch dimension."""
        return Cells(self.frame_N[index], self.row_N[index], self.column_N[index])

    def alike(self) -> bool:
        """Whether all samples of a batch have the same frames of the same shapes."""
        # Frame numbers run through the batch; relative to a sample's first frame they are equal if
        # the samples have the same frames. Padding (-1) differs then, which costs only the shared
        # mask.
        frame = self.frame_N - self.frame_N[:, :1]
        return all(bool((part == part[:1]).all()) for part in (frame, self.row_N, self.column_N))


def neighbours(query: Cells, key: Cells, window: Window) -> Tensor:
    """Mark the visual keys in each query's window, bool [..., Q, K]."""

    def distance(q: Tensor, k: Tensor) -> Tensor:
        return q[..., :, None] - k[..., None, :]

    down, right = distance(query.row_N, key.row_N), distance(query.column_N, key.column_N)
    near = torch.maximum(down.abs(), right.abs()) <= window.radius
    if window.causal:
        near &= (down > 0) | ((down == 0) & (right >= 0))
    return near & (distance(query.frame_N, key.frame_N) == 0)


def bands(cells: Cells, window: Window) -> list[tuple[slice, slice]] | None:
    """Cut one sample's rows into bands of whole grid rows, with the keys in reach of each.

    Each pair is (queries, keys) as positions among the N rows. None if the rows are not whole
    frames in raster order, as after token pruning.
    """
    frame_N = cells.frame_N.cpu()
    _, counts = torch.unique_consecutive(frame_N, return_counts=True)
    found, start = [], 0
    for count in counts.tolist():
        part = slice(start, start + count)
        # Padding (frame -1) gets no band: no query, so its output stays zero.
        width = int(cells.column_N[part].max()) + 1
        if int(frame_N[start]) >= 0:
            if not _is_raster(cells.part(part), width):
                return None
            found += _frame_bands(part, width, window.radius)
        start += count
    return found


def _is_raster(frame: Cells, width: int) -> bool:
    order = torch.arange(len(frame.row_N), device=frame.row_N.device)
    return bool((frame.row_N * width + frame.column_N == order).all())


def _frame_bands(frame: slice, width: int, radius: int) -> list[tuple[slice, slice]]:
    """Cut one frame into bands, each with the surrounding rows in reach of its windows."""
    height = (frame.stop - frame.start) // width
    step = max(1, BAND_QUERIES // width)
    pieces = []
    for top in range(0, height, step):
        bottom = min(top + step, height)
        first, last = max(0, top - radius), min(height, bottom + radius)
        query = slice(frame.start + top * width, frame.start + bottom * width)
        pieces.append((query, slice(frame.start + first * width, frame.start + last * width)))
    return pieces
