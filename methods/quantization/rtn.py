"""Rounding to nearest: every weight to the nearest value of its grid, without calibration.

Shapes: R rows, C columns, G groups of columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.quantization.grid import Clip, Quantized, fit


def round_to_nearest(
    weight_RC: Tensor, groups: list[slice], bits_RG: Tensor, clip: Clip = "minmax"
) -> Quantized:
    """Return the quantized matrix; each group of columns has its own grids."""
    weight_RC = weight_RC.float()
    codes_RC = torch.zeros_like(weight_RC, dtype=torch.uint8)
    scale_RG = torch.zeros_like(bits_RG, dtype=torch.float16)
    offset_RG = torch.zeros_like(scale_RG)
    for number, group in enumerate(groups):
        grid = fit(weight_RC[:, group], bits_RG[:, number], clip)
        codes_RC[:, group] = grid.codes(weight_RC[:, group]).to(torch.uint8)
        scale_RG[:, number] = grid.scale[:, 0].half()
        offset_RG[:, number] = grid.offset[:, 0].half()
    return Quantized(codes_RC, scale_RG, offset_RG)


def rounded(weight_RC: Tensor, bits: int, group: int, clip: Clip = "minmax") -> Tensor:
    """Quantize weights to `bits` and return the dequantized values, float32."""
    columns = weight_RC.shape[1]
    groups = [slice(start, min(start + group, columns)) for start in range(0, columns, group)]
    bits_RG = torch.full((len(weight_RC), len(groups)), bits, device=weight_RC.device)
    return round_to_nearest(weight_RC, groups, bits_RG, clip).values(groups)
