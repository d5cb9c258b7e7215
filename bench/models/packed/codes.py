"""Codes of 1 to 8 bits packed into bytes without gaps.

Shapes: N codes.

A byte holds a whole number of 1-, 2-, 4- or 8-bit codes. Any other width is split into planes of
these widths, lowest bits last: a 3-bit code is its upper two bits in one plane and its lowest in
another. Each plane is padded to a whole byte, so at most 3 · 7 bits are lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTHS = (8, 4, 2, 1)


def planes(bits: int) -> list[tuple[int, int]]:
    """Return (width, shift) of every plane: the low `width` bits of `code >> shift`."""
    # The binary digits of `bits` are the widths of the planes (7 = 4 + 2 + 1). `bits & (width - 1)`
    # is the sum of the smaller planes, that is the number of bits below this one. Wide planes come
    # first, so the 1-bit plane with the lowest bits is last.
    return [(width, bits & (width - 1)) for width in WIDTHS if bits & width]


def packed_size(count: int, bits: int) -> int:
    """Return the number of bytes that `count` codes take."""
    return sum(-(-count * width // 8) for width, _ in planes(bits))


def pack(codes_N: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes below 2^bits into uint8 [packed_size(N, bits)]."""
    return torch.cat([_pack(codes_N >> shift, width) for width, shift in planes(bits)])


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Invert `pack_codes`, uint8 [count]."""
    codes_N = torch.zeros(count, dtype=torch.uint8, device=packed.device)
    start = 0
    for width, shift in planes(bits):
        stop = start + packed_size(count, width)
        # A plane's padding can hold whole codes, which are cut off here.
        codes_N |= _unpack(packed[start:stop], width)[:count] << shift
        start = stop
    return codes_N


def _pack(codes_N: Tensor, width: int) -> Tensor:
    """Pack the lowest `width` bits of every code; `width` divides 8."""
    per_byte = 8 // width
    low_N = codes_N & (2**width - 1)
    padded = torch.nn.functional.pad(low_N, (0, -len(low_N) % per_byte))
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes_N.device)
    # A sum of bytes with disjoint bits is their union, and unlike `|` a reduction exists for it.
    packed: Tensor = (padded.view(-1, per_byte) << shifts).sum(1, dtype=torch.uint8)
    return packed


def _unpack(packed: Tensor, width: int) -> Tensor:
    """Invert `_pack_plane`, padding included."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    codes: Tensor = (packed[:, None] >> shifts) & (2**width - 1)
    return codes.flatten()
