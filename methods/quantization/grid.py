"""Grids of equally spaced values, one for every row of a group of weights.

Shapes: R rows, C columns of a matrix, c columns of one group, G groups. A weight is
offset + scale · code with code 0 … 2^bits - 1. Scale and offset are rounded to half precision
before any code is chosen, since that is how they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bench.models.packed import PackedShape

Clip = Literal["minmax", "mse"]
# Shares of the range tried by clip="mse".
SHRINKS = tuple(step / 20 for step in range(20, 5, -1))


@dataclass(frozen=True)
class Grid:
    """Scale, offset and largest code of every row, all [R, 1]."""

    scale: Tensor
    offset: Tensor
    top: Tensor

    def codes(self, weight_Rc: Tensor) -> Tensor:
        """Return the nearest codes, as floating-point numbers; a row of scale 0 has code 0."""
        step = torch.where(self.scale > 0, self.scale, 1)
        codes_Rc = torch.round((weight_Rc - self.offset) / step).clamp(min=0)
        return torch.minimum(codes_Rc, self.top) * (self.scale > 0)

    def values(self, codes_Rc: Tensor) -> Tensor:
        """Return what the codes stand for."""
        return self.offset + self.scale * codes_Rc


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix: codes uint8 [R, C], scale and offset float16 [R, G]."""

    codes: Tensor
    scale: Tensor
    offset: Tensor

    def rows(self, place: slice) -> Quantized:
        """Return some of the rows."""
        return Quantized(self.codes[place], self.scale[place], self.offset[place])

    def values(self, groups: Sequence[slice]) -> Tensor:
        """Return the weights as float32 numbers, [R, C]."""
        widths = torch.tensor([g.stop - g.start for g in groups], device=self.codes.device)
        scale_RC, offset_RC = (
            grid_RG.float().repeat_interleave(widths, dim=1)
            for grid_RG in (self.scale, self.offset)
        )
        return torch.addcmul(offset_RC, scale_RC, self.codes.float())


def row_bits(shape: PackedShape, device: torch.device) -> Tensor:
    """Return the bits of every row in every group, int64 [R, G]."""
    bits_RG = torch.zeros(shape.rows, len(shape.groups()), dtype=torch.int64, device=device)
    for block in shape.blocks():
        bits_RG[block.rows, block.groups] = block.bits
    return bits_RG


def fit(weight_Rc: Tensor, bits_R: Tensor, clip: Clip = "minmax") -> Grid:
    """Return the grid of every row of one group.

    From the least to the greatest weight; with `mse`, from that range shrunk about its middle to
    the share with the least squared error. One bit is binary: mean ± mean absolute deviation, the
    pair of least squared error among those that lie evenly about the mean.
    """
    low_R1, high_R1 = weight_Rc.amin(1, keepdim=True), weight_Rc.amax(1, keepdim=True)
    top_R1 = (2**bits_R - 1).to(weight_Rc)[:, None]
    grid = _between(low_R1, high_R1, top_R1)
    if clip == "mse":
        grid = _least_error(weight_Rc, low_R1, high_R1, top_R1)
    mean_R1 = weight_Rc.mean(1, keepdim=True)
    spread_R1 = (weight_Rc - mean_R1).abs().mean(1, keepdim=True)
    binary = _between(mean_R1 - spread_R1, mean_R1 + spread_R1, top_R1)
    return _where(bits_R[:, None] == 1, binary, grid)


def _between(low_R1: Tensor, high_R1: Tensor, top_R1: Tensor) -> Grid:
    """Return the grids from `low` to `high`, rounded as they are stored."""
    scale_R1, offset_R1 = (high_R1 - low_R1) / top_R1, low_R1
    return Grid(scale_R1.half().to(low_R1), offset_R1.half().to(low_R1), top_R1)


def _least_error(weight_Rc: Tensor, low_R1: Tensor, high_R1: Tensor, top_R1: Tensor) -> Grid:
    """Return, row by row, the grid over the share of the range with the least squared error."""
    middle_R1, half_R1 = (high_R1 + low_R1) / 2, (high_R1 - low_R1) / 2
    best, least_R1 = _between(low_R1, high_R1, top_R1), torch.full_like(low_R1, torch.inf)
    for share in SHRINKS:
        grid = _between(middle_R1 - share * half_R1, middle_R1 + share * half_R1, top_R1)
        error_Rc = weight_Rc - grid.values(grid.codes(weight_Rc))
        error_R1 = error_Rc.square().sum(1, keepdim=True)
        best = _where(error_R1 < least_R1, grid, best)
        least_R1 = torch.minimum(least_R1, error_R1)
    return best


def _where(choose_R1: Tensor, one: Grid, other: Grid) -> Grid:
    """Return rows of one grid where chosen, of the other elsewhere."""
    return Grid(
        torch.where(choose_R1, one.scale, other.scale),
        torch.where(choose_R1, one.offset, other.offset),
        one.top,
    )
