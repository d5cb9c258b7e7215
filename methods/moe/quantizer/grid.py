"""Quantization grids: equally spaced values, one grid per row of a group of columns.

Shapes: R rows, C columns of a matrix, c columns of one group, G groups.

A weight is offset + scale · code with code 0 … 2^bits - 1. Scale and offset are rounded to float16
before any code is chosen, because that is how they are stored.

In a `zero_point` grid the offset is -scale · z with an integer z, the code of 0, as in the releases
of GPTQ and AWQ; in a `symmetric` grid z is 2^(bits - 1). Inference engines support these two. They
store scales in the dtype of the weights, so scales are rounded to the 8 significant bits that
float16 and bfloat16 have in common, and every engine reads the same number.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from bench.models.bitpacking.packed_shape import GridKind, PackedShape

Clip = Literal["minmax", "mse"]

# Fractions of the range that clip="mse" tries, from 1.0 down to 0.3.
CLIP_SHARES = tuple(step / 20 for step in range(20, 5, -1))
ALTERNATIONS = 50
"""Rounds in which BitsMoE fits codes of 2 to 4 bits and their scale in turn."""


@dataclass(frozen=True)
class QuantGrid:
    """Scale, offset and largest code of every row, all [R, 1]."""

    scale: Tensor
    offset: Tensor
    max_code: Tensor

    def codes(self, weight_Rc: Tensor) -> Tensor:
        """Return the nearest codes as floats; a row of scale 0 gets code 0."""
        # A row of equal weights, or of a range that underflows in float16, has scale 0 and its
        # value in the offset. Dividing by 1 instead avoids 0 / 0 = NaN, and the product below
        # forces code 0.
        step = torch.where(self.scale > 0, self.scale, 1)
        codes_Rc = torch.round((weight_Rc - self.offset) / step).clamp(min=0)
        return torch.minimum(codes_Rc, self.max_code) * (self.scale > 0)

    def values(self, codes_Rc: Tensor) -> Tensor:
        """Return the weights that the codes represent."""
        return self.offset + self.scale * codes_Rc


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantized matrix: codes uint8 [R, C], scale float16 and offset [R, G].

    Offsets are float16, or float32 where they are -scale · z, which float16 cannot hold exactly.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor

    def rows(self, place: slice) -> QuantizedMatrix:
        """Return a slice of the rows."""
        return QuantizedMatrix(self.codes[place], self.scale[place], self.offset[place])

    def values(self, groups: Sequence[slice]) -> Tensor:
        """Return the dequantized weights, float32 [R, C]."""
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


def fit_grid(
    weight_Rc: Tensor, bits_R: Tensor, clip: Clip = "minmax", kind: GridKind = "offset"
) -> QuantGrid:
    """Fit a grid to every row of one group.

    With `minmax` a grid spans the least to the greatest weight; with `mse` that range is shrunk
    about its middle to the fraction with the least squared error. A range is extended to include 0
    if the grid has a code for 0. One bit, which only an `offset` grid supports, is binary
    quantization to mean ± mean absolute deviation, the pair of least squared error among all that
    are symmetric about the mean.
    """
    low_R1, high_R1 = weight_Rc.amin(1, keepdim=True), weight_Rc.amax(1, keepdim=True)
    max_code_R1 = (2**bits_R - 1).to(weight_Rc)[:, None]
    if kind == "symmetric":
        high_R1 = torch.maximum(high_R1, -low_R1)
        low_R1 = -high_R1
    between = partial(_GRID_OF_RANGE[kind], max_code_R1=max_code_R1)
    grid = between(low_R1, high_R1)
    if clip == "mse":
        grid = _least_error_grid(weight_Rc, low_R1, high_R1, between)
    if kind != "offset":
        return grid
    mean_R1 = weight_Rc.mean(1, keepdim=True)
    spread_R1 = (weight_Rc - mean_R1).abs().mean(1, keepdim=True)
    # Computed for all rows, since one group may mix rows of different bits. For these rows the
    # largest code is 1, so the two values of the grid are the two ends.
    binary = between(mean_R1 - spread_R1, mean_R1 + spread_R1)
    return _select_grid_rows(bits_R[:, None] == 1, binary, grid)


def _offset_grid(low_R1: Tensor, high_R1: Tensor, max_code_R1: Tensor) -> QuantGrid:
    # Rounded to float16 here, so that codes are chosen for the grid as it is stored.
    scale_R1, offset_R1 = (high_R1 - low_R1) / max_code_R1, low_R1
    return QuantGrid(scale_R1.half().to(low_R1), offset_R1.half().to(low_R1), max_code_R1)


def _zero_point_grid(low_R1: Tensor, high_R1: Tensor, max_code_R1: Tensor) -> QuantGrid:
    low_R1, high_R1 = low_R1.clamp(max=0), high_R1.clamp(min=0)
    scale_R1 = _shared_precision((high_R1 - low_R1) / max_code_R1)
    zero_R1 = torch.round(-low_R1 / torch.where(scale_R1 > 0, scale_R1, 1))
    zero_R1 = torch.minimum(zero_R1, max_code_R1)
    return QuantGrid(scale_R1, -scale_R1 * zero_R1, max_code_R1)


def _symmetric_grid(low_R1: Tensor, high_R1: Tensor, max_code_R1: Tensor) -> QuantGrid:
    scale_R1 = _shared_precision((high_R1 - low_R1) / max_code_R1)
    return QuantGrid(scale_R1, scale_R1 * -(max_code_R1 + 1) / 2, max_code_R1)


def _shared_precision(scale_R1: Tensor) -> Tensor:
    """Round to 8 significant bits in float16's range, which bfloat16 then holds exactly."""
    return scale_R1.bfloat16().half().to(scale_R1)


_GRID_OF_RANGE: dict[GridKind, Callable[..., QuantGrid]] = {
    "offset": _offset_grid,
    "zero_point": _zero_point_grid,
    "symmetric": _symmetric_grid,
}


def _least_error_grid(
    weight_Rc: Tensor,
    low_R1: Tensor,
    high_R1: Tensor,
    between: Callable[[Tensor, Tensor], QuantGrid],
) -> QuantGrid:
    """Return the grid of each row over the fraction of its range with the least squared error."""
    middle_R1, half_R1 = (high_R1 + low_R1) / 2, (high_R1 - low_R1) / 2
    best, least_R1 = between(low_R1, high_R1), torch.full_like(low_R1, torch.inf)
    # A search instead of a formula: the error of rounding is not convex in the range, and 15
    # candidates are cheap. Ties keep the wider range, which is tried first.
    for share in CLIP_SHARES:
        grid = between(middle_R1 - share * half_R1, middle_R1 + share * half_R1)
        error_Rc = weight_Rc - grid.values(grid.codes(weight_Rc))
        error_R1 = error_Rc.square().sum(1, keepdim=True)
        best = _select_grid_rows(error_R1 < least_R1, grid, best)
        least_R1 = torch.minimum(least_R1, error_R1)
    return best


def _select_grid_rows(choose_R1: Tensor, one: QuantGrid, other: QuantGrid) -> QuantGrid:
    return QuantGrid(
        # `max_code` depends on the bits only and is the same in both.
        torch.where(choose_R1, one.scale, other.scale),
        torch.where(choose_R1, one.offset, other.offset),
        one.max_code,
    )


def quantize_groups(
    weight_RC: Tensor,
    groups: Sequence[slice],
    bits_RG: Tensor,
    clip: Clip,
    round_group: Callable[[slice, QuantGrid], Tensor],
    kind: GridKind = "offset",
) -> QuantizedMatrix:
    """Fit a grid to each group of columns in turn, and call `round_group` for its codes [R, c].

    A grid is fitted only when its group is reached, so `round_group` may change later columns.
    """
    codes_RC = torch.zeros_like(weight_RC, dtype=torch.uint8)
    scale_RG = torch.zeros_like(bits_RG, dtype=torch.float16)
    offset_RG = torch.zeros_like(
        scale_RG, dtype=torch.float16 if kind == "offset" else torch.float32
    )
    for number, group in enumerate(groups):
        grid = fit_grid(weight_RC[:, group], bits_RG[:, number], clip, kind)
        codes_RC[:, group] = round_group(group, grid).to(torch.uint8)
        scale_RG[:, number] = grid.scale[:, 0].half()
        offset_RG[:, number] = grid.offset[:, 0].to(offset_RG.dtype)
    return QuantizedMatrix(codes_RC, scale_RG, offset_RG)


def round_to_nearest(
    weight_RC: Tensor,
    groups: Sequence[slice],
    bits_RG: Tensor,
    clip: Clip = "minmax",
    kind: GridKind = "offset",
) -> QuantizedMatrix:
    """Return the matrix with every weight rounded to the nearest value of its grid."""
    weight_RC = weight_RC.float()

    def nearest(group: slice, grid: QuantGrid) -> Tensor:
        return grid.codes(weight_RC[:, group])

    return quantize_groups(weight_RC, groups, bits_RG, clip, nearest, kind)


def round_weights(
    weight_RC: Tensor, bits: int, group: int, clip: Clip = "minmax", kind: GridKind = "offset"
) -> Tensor:
    """Quantize weights to `bits` and return the dequantized values, float32."""
    return RoundedWeights(group, clip, kind).values("weight", weight_RC, bits)


class RoundedWeights:
    """Cache of weights rounded to nearest, for use on many chunks of text.

    Fitting a grid is slow and dequantizing is fast, so codes and grids are kept, one byte per
    weight and bit width, and the weights are dequantized on every use.
    """

    def __init__(self, group: int, clip: Clip, kind: GridKind = "offset") -> None:
        self._group, self._clip, self._kind = group, clip, kind
        self._rounded: dict[tuple[Hashable, int], QuantizedMatrix] = {}

    def values(self, name: Hashable, weight_RC: Tensor, bits: int) -> Tensor:
        """Return the dequantized weights, float32; `name` identifies the matrix."""
        groups = column_groups(weight_RC.shape[1], self._group)
        found = self._rounded.get((name, bits))
        if found is None:
            bits_RG = torch.full((len(weight_RC), len(groups)), bits, device=weight_RC.device)
            found = round_to_nearest(weight_RC, groups, bits_RG, self._clip, self._kind)
            self._rounded[name, bits] = found
        return found.values(groups)


def column_groups(columns: int, group: int) -> list[slice]:
    """Return the columns in groups of `group`; the last one may be smaller."""
    return [slice(start, min(start + group, columns)) for start in range(0, columns, group)]


def quantize_signed(weight_RC: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Return signed codes [R, C] and scales [R, G] by BitsMoE's quantizer (its code @ 8b2b52d).

    1 bit: the sign times the mean magnitude. 2 to 4 bits: codes and least-squares scale in turn,
    from the mean magnitude on. More: the largest magnitude at the largest code.
    """
    codes, scales = [], []
    for weight_Rc in weight_RC.split(group, dim=1):
        code_Rc, scale_R1 = _quantize_signed_group(weight_Rc, bits)
        codes.append(code_Rc)
        scales.append(scale_R1)
    return torch.cat(codes, 1), torch.cat(scales, 1)


def _quantize_signed_group(weight_Rc: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    tiny = 1e-8
    top = 2 ** (bits - 1) - 1
    scale_R1 = weight_Rc.abs().mean(1, keepdim=True).clamp(min=tiny)
    if bits == 1:
        return torch.where(weight_Rc < 0, -1.0, 1.0).to(weight_Rc), scale_R1
    if bits > 4:
        scale_R1 = (weight_Rc.abs().amax(1, keepdim=True) / top).clamp(min=tiny)
        return (weight_Rc / scale_R1).round().clamp(-top - 1, top), scale_R1
    code_Rc = weight_Rc
    for _ in range(ALTERNATIONS):
        code_Rc = (weight_Rc / scale_R1).round().clamp(-top - 1, top)
        fit_R1 = (weight_Rc * code_Rc).mean(1, keepdim=True)
        scale_R1 = (fit_R1 / (code_Rc.square().mean(1, keepdim=True) + tiny)).clamp(min=tiny)
    return code_Rc, scale_R1
