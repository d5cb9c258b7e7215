"""Bits per part of a packed matrix, and the bytes that it takes.

A matrix has R rows and C columns (the input dimension). Its bits vary over rows or over columns, in
runs called levels. Every row has a grid (scale and offset, 16 bits each) for each group of columns;
a group never crosses a level. The last group of a level may be narrower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

from bench.models.packed.codes import packed_size

GRID_BITS = 32
ORDER_BITS = 16
# The order of columns is stored as int16.
LARGEST_ORDER = 2**15


class Level(NamedTuple):
    """A run of rows or columns with the same number of bits."""

    bits: int
    size: int


class Block(NamedTuple):
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
    """Layout of a packed matrix; the levels run along `axis`.

    With `permuted`, columns are stored in a different order than the input's, and the order is
    stored as well.
    """

    rows: int
    columns: int
    levels: tuple[Level, ...]
    axis: Literal["rows", "columns"] = "rows"
    group: int = 128
    permuted: bool = False

    def __post_init__(self) -> None:
        length = self.rows if self.axis == "rows" else self.columns
        if sum(level.size for level in self.levels) != length:
            raise ValueError(f"levels {self.levels} do not cover {length} {self.axis}")
        if any(not 1 <= level.bits <= 8 for level in self.levels):
            raise ValueError(f"levels {self.levels} must have 1 to 8 bits")
        if self.permuted and self.columns > LARGEST_ORDER:
            raise ValueError(f"{self.columns} columns cannot be permuted, at most {LARGEST_ORDER}")

    def groups(self) -> list[slice]:
        """Return the columns of every group."""
        # Levels along rows share the groups of the full width; levels along columns start groups of
        # their own.
        runs = [self.columns] if self.axis == "rows" else [level.size for level in self.levels]
        return [
            slice(start, min(start + self.group, run.stop))
            for run in _slices(runs)
            for start in range(run.start, run.stop, self.group)
        ]

    def blocks(self) -> Iterator[Block]:
        """Yield the levels' parts of the matrix in order."""
        places = _slices([level.size for level in self.levels])
        counts = [-(-level.size // self.group) for level in self.levels]
        everything = slice(0, self.columns)
        for level, place, groups in zip(self.levels, places, _slices(counts), strict=True):
            if self.axis == "rows":
                yield Block(level.bits, place, everything, slice(0, len(self.groups())))
            else:
                yield Block(level.bits, slice(0, self.rows), place, groups)

    @property
    def grids(self) -> int:
        """Number of (scale, offset) pairs."""
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
        return GRID_BITS * self.grids + (ORDER_BITS * self.columns if self.permuted else 0)


def _slices(sizes: list[int]) -> list[slice]:
    stops = list(accumulate(sizes))
    return [slice(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
