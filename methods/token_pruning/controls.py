"""Controls: tokens of a coarser grid, random tokens. Shapes: I frames, M tokens of a frame."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from bench.method import Context
from methods.token_pruning.base import BeforeDecoder, frame_sides, top_tokens
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import ChooseTokens, SelectionSizes


class Downsample(BeforeDecoder):
    """Keep tokens that are spread evenly over the image."""

    label: ClassVar[str] = "downsample"

    def _choose(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        keep_IM = torch.zeros_like(inputs.valid)
        sides = zip(*(side.tolist() for side in frame_sides(inputs, self.label)), strict=True)
        for number, ((rows, columns), keep) in enumerate(zip(sides, keep_I.tolist(), strict=True)):
            # In a whole frame cell (row, column) has index row · columns + column.
            cells = even_grid_cells(rows, columns, keep)
            keep_IM[number, [row * columns + column for row, column in cells]] = True
        return TokenSelection(keep_IM)

    def _macs(self, sizes: SelectionSizes) -> float:
        return 0.0


def even_grid_cells(rows: int, columns: int, keep: int) -> list[tuple[int, int]]:
    """List `keep` cells (row, column) of a grid, spread evenly over it.

    The number of grid rows used is such that distances between cells are similar in both
    directions. Cells are divided among these rows as evenly as possible, and centred. 144 cells of
    24x24 are every second row and column.
    """
    # Square spacing: used / rows = (keep / used) / columns, solved for the rows used.
    used = round((keep * rows / columns) ** 0.5)
    # No row can hold more than `columns` cells, so at least ⌈keep / columns⌉ rows are needed.
    used = min(rows, max(used, -(-keep // columns), 1))
    cells = []
    for i in range(used):
        # Differences of rounded-down multiples sum to `keep` exactly, whatever the remainder.
        count = keep * (i + 1) // used - keep * i // used
        row = (2 * i + 1) * rows // (2 * used)
        cells += [(row, (2 * j + 1) * columns // (2 * count)) for j in range(count)]
    return cells


class RandomTokens(BeforeDecoder):
    """Keep random tokens, drawn with the run's seed; the same ones in all images of equal size.

    The tokens of a sample therefore depend neither on the batch nor on the order of evaluation. Run
    several seeds to average over the draw.
    """

    label: ClassVar[str] = "random_tokens"

    def _bound_choose(self, context: Context) -> ChooseTokens:
        return partial(self._drawn, seed=context.seed)

    def _choose(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        return self._drawn(inputs, keep_I, seed=0)

    def _macs(self, sizes: SelectionSizes) -> float:
        return 0.0

    def _drawn(self, inputs: SelectionInputs, keep_I: Tensor, seed: int) -> TokenSelection:
        score_IM = torch.zeros(inputs.valid.shape)
        for number, count in enumerate(inputs.frames.counts):
            # A new CPU generator per frame, so that the draw depends only on seed and frame size.
            generator = torch.Generator().manual_seed(seed)
            score_IM[number, :count] = torch.rand(count, generator=generator)
        return TokenSelection(top_tokens(score_IM.to(keep_I.device), inputs.valid, keep_I))
