"""Downsampling to a coarser grid of tokens, a control that many methods do not beat."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.errors import UserError
from methods.token_pruning.grid import subsampled
from methods.token_pruning.pruning import BeforeDecoder
from methods.visual_tokens.sight import Choice, Sight
from methods.visual_tokens.sizes import Sizes


class Downsample(BeforeDecoder):
    """Keep tokens that are spread evenly over the image."""

    def _choose(self, sight: Sight, keep_I: Tensor) -> Choice:
        if sight.frames.counts != sight.whole:
            raise UserError("downsample needs whole images: list it before other token pruning")
        keep_IM = torch.zeros_like(sight.valid)
        for number, (count, keep) in enumerate(
            zip(sight.frames.counts, keep_I.tolist(), strict=True)
        ):
            # Frames are packed in raster order, so the width of a whole frame follows from its last
            # column and cell (row, column) has index row · columns + column. After other token
            # pruning neither holds, which is why partial frames are refused above.
            columns = int(sight.cells.column_N[number, :count].max()) + 1
            cells = subsampled(count // columns, columns, keep)
            keep_IM[number, [row * columns + column for row, column in cells]] = True
        return Choice(keep_IM)

    def _macs(self, sizes: Sizes) -> float:
        return 0.0
