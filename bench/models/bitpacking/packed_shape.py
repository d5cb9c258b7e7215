"""Codes of 1 to 8 bits packed into bytes, and the bits spent on each part of a matrix.

A byte holds a whole number of 1-, 2-, 4- or 8-bit codes. Other widths are split into planes of
these widths, lowest bits last: a 3-bit code has its upper two bits in one plane and its lowest bit
in another. Each plane is padded to whole bytes, so at most 3 · 7 bits are lost.

A matrix has R rows and C columns (the input dimension). Its bits vary over rows or over columns, in
runs called levels. Every row has a grid per group of columns, and a group never crosses a level.
The last group of a level may be narrower. An `offset` grid is a scale and an offset of 16 bits
each. A `zero_point` grid is a scale and an 8-bit integer, the code that stands for 0. A `symmetric`
grid is only a scale, with 0 at the code 2^(bits - 1), or halfway between the two codes of 1 bit.
Shapes: N codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

PLANE_WIDTHS = (8, 4, 2, 1)


def bit_planes(bits: int) -> list[tuple[int, int]]:
    """Return (width, shift) of every plane: the low `width` bits of `code >> shift`."""
    # The binary digits of `bits` are the widths of the planes (7 = 4 + 2 + 1). `bits & (width - 1)`
    # is the sum of the smaller planes, that is the number of bits below this plane. Wide planes
    # come first, so the plane with the lowest bits is last.
    return [(width, bits & (width - 1)) for width in PLANE_WIDTHS if bits & width]


def packed_size(count: int, bits: int) -> int:
    """Return the size of `count` packed codes in bytes."""
    return sum(-(-count * width // 8) for width, _ in bit_planes(bits))


def pack_codes(codes_N: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes below 2^bits into uint8 [packed_size(N, bits)]."""
    return torch.cat([_pack_plane(codes_N >> shift, width) for width, shift in bit_planes(bits)])


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Invert `pack_codes`; return uint8 [count]."""
    codes_N = torch.zeros(count, dtype=torch.uint8, device=packed.device)
    start = 0
    for width, shift in bit_planes(bits):
        stop = start + packed_size(count, width)
        # The padding of a plane can contain whole codes, which are dropped here.
        codes_N |= _unpack_plane(packed[start:stop], width)[:count] << shift
        start = stop
    return codes_N


def _pack_plane(codes_N: Tensor, width: int) -> Tensor:
    """Pack the lowest `width` bits of every code; `width` divides 8."""
    per_byte = 8 // width
    low_N = codes_N & (2**width - 1)
    padded = torch.nn.functional.pad(low_N, (0, -len(low_N) % per_byte))
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes_N.device)
    # Summing bytes with disjoint bits is the same as `|`, for which torch has no reduction.
    packed: Tensor = (padded.view(-1, per_byte) << shifts).sum(1, dtype=torch.uint8)
    return packed


def _unpack_plane(packed: Tensor, width: int) -> Tensor:
    """Invert `_pack_plane`, padding included."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    codes: Tensor = (packed[:, None] >> shifts) & (2**width - 1)
    return codes.flatten()


GridKind = Literal["offset", "zero_point", "symmetric"]

GRID_BITS = 32
GRID_BITS_OF: dict[GridKind, int] = {"offset": GRID_BITS, "zero_point": 24, "symmetric": 16}
ORDER_BITS = 16

# The order of columns is stored as int16.
MAX_PERMUTED_COLUMNS = 2**15


class Level(NamedTuple):
    """A run of rows or columns with the same number of bits."""

    bits: int
    size: int


class BitBlock(NamedTuple):
    """The part of a matrix that belongs to one level: rows, columns and their groups."""

    bits: int
    rows: slice
    columns: slice
    groups: slice

    @property
    def height(self) -> int:
        """Number of rows."""
        return int(self.rows.stop - self.rows.start)

    @property
    def width(self) -> int:
        """Number of columns."""
        return int(self.columns.stop - self.columns.start)

    @property
    def area(self) -> int:
        """Number of weights."""
        return self.height * self.width


@dataclass(frozen=True)
class PackedShape:
    """Layout of a packed matrix; the levels are along `axis`.

    With `permuted`, columns are not in the order of the input, and their order is stored as well.
    A `transposed` matrix is the transpose of the weights: its rows are inputs.
    """

    rows: int
    columns: int
    levels: tuple[Level, ...]
    axis: Literal["rows", "columns"] = "rows"
    group: int = 128
    permuted: bool = False
    grid: GridKind = "offset"
    transposed: bool = False

    def __post_init__(self) -> None:
        length = self.rows if self.axis == "rows" else self.columns
        if sum(level.size for level in self.levels) != length:
            raise ValueError(f"levels {self.levels} do not cover {length} {self.axis}")
        if any(not 1 <= level.bits <= 8 for level in self.levels):
            raise ValueError(f"levels {self.levels} must have 1 to 8 bits")
        if self.grid not in GRID_BITS_OF:
            raise ValueError(f"a grid {self.grid!r} is unknown, allowed: {', '.join(GRID_BITS_OF)}")
        if self.grid == "zero_point" and any(level.bits < 2 for level in self.levels):
            raise ValueError(f"a zero_point grid needs at least 2 bits, not {self.levels}")
        if self.permuted and self.transposed:
            raise ValueError("a transposed matrix has no order of columns")
        if self.permuted and self.columns > MAX_PERMUTED_COLUMNS:
            raise ValueError(
                f"{self.columns} columns cannot be permuted, at most {MAX_PERMUTED_COLUMNS}"
            )

    def groups(self) -> list[slice]:
        """Return the columns of every group."""
        # Levels along rows share the groups of the full width; each level along columns has its own
        # groups.
        runs = [self.columns] if self.axis == "rows" else [level.size for level in self.levels]
        return [
            slice(start, min(start + self.group, run.stop))
            for run in consecutive_slices(runs)
            for start in range(run.start, run.stop, self.group)
        ]

    def blocks(self) -> Iterator[BitBlock]:
        """Yield the levels' parts of the matrix in order."""
        places = consecutive_slices([level.size for level in self.levels])
        counts = [-(-level.size // self.group) for level in self.levels]
        everything = slice(0, self.columns)
        for level, place, groups in zip(
            self.levels, places, consecutive_slices(counts), strict=True
        ):
            if self.axis == "rows":
                yield BitBlock(level.bits, place, everything, slice(0, len(self.groups())))
            else:
                yield BitBlock(level.bits, slice(0, self.rows), place, groups)

    @property
    def grids(self) -> int:
        """Number of grids."""
        return self.rows * len(self.groups())

    @property
    def code_bytes(self) -> int:
        """Bytes taken by the codes."""
        return sum(packed_size(block.area, block.bits) for block in self.blocks())

    @property
    def weight_bits(self) -> int:
        """Bits spent on the weights themselves."""
        return sum(block.bits * block.area for block in self.blocks())

    @property
    def overhead_bits(self) -> int:
        """Bits spent on grids and on the order of columns."""
        return GRID_BITS_OF[self.grid] * self.grids + (
            ORDER_BITS * self.columns if self.permuted else 0
        )


def consecutive_slices(sizes: list[int]) -> list[slice]:
    """Return consecutive slices of these sizes."""
    stops = list(accumulate(sizes))
    return [slice(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
