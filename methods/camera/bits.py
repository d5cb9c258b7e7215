"""CAMERA-Q's share-out: micro-experts of more energy get more bits, the layer's mean exactly kept.

Shapes: F an expert's width.

An expert's micro-experts are ordered by energy and cut into blocks, the unit of the share-out, so
that bits change where a group of the down matrix ends anyway. Only where a level's total is not a
whole number of blocks is one block divided.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bench.models.packed import Level

Scope = Literal["layer", "expert"]
BLOCKS_PER_EXPERT = 8


@dataclass(frozen=True)
class Unit:
    """A block of micro-experts of one expert, consecutive in its order; it is ranked by `key`."""

    expert: int
    size: int
    key: tuple[float, float]


def by_energy(energy_F: Tensor) -> Tensor:
    """Return the order of falling energy; equal ones keep their order."""
    return torch.argsort(energy_F, descending=True, stable=True)


def block_size(widths: Sequence[int], group: int) -> int:
    """Return how many micro-experts change their bits together unless a config says so.

    A group, or an eighth of the narrowest expert if that is less, so that every expert can hold
    several levels.
    """
    narrowest = min((width for width in widths if width), default=1)
    return min(group, max(1, narrowest // BLOCKS_PER_EXPERT))


def cut(size: int, block: int) -> list[int]:
    """Return the sizes of an expert's blocks; the last one may be smaller."""
    return [min(block, size - start) for start in range(0, size, block)]


def units(energies: Sequence[Tensor], block: int, scope: Scope) -> list[Unit]:
    """Return all experts' blocks, first the one that deserves most bits.

    Within a `layer` blocks are compared by their mean energy. With scope `expert` every expert
    gets its share of each level: blocks are compared by their place in their own expert, and by
    energy only among equal places.
    """
    found = []
    for expert, energy_F in enumerate(energies):
        sizes = cut(len(energy_F), block)
        ordered_F = energy_F.sort(descending=True, stable=True).values
        for place, part in enumerate(torch.split(ordered_F, sizes) if sizes else ()):
            mean = float(part.mean())
            rank = place / len(sizes) if scope == "expert" else 0.0
            found.append(Unit(expert, len(part), (rank, -mean)))
    return sorted(found, key=lambda unit: unit.key)


def share_out(ranked: Sequence[Unit], levels: Sequence[Level], experts: int) -> list[list[Level]]:
    """Deal the levels, most bits first, to blocks in their order; return each expert's levels.

    The sizes of the levels together are those of the blocks. An expert's first block comes before
    its second, so its levels run over its micro-experts in order of energy.
    """
    sizes = [dict.fromkeys((level.bits for level in levels), 0) for _ in range(experts)]
    for unit, bits, taken in _dealt(ranked, levels):
        sizes[unit.expert][bits] += taken
    return [[Level(bits, size) for bits, size in own.items() if size] for own in sizes]


def _dealt(ranked: Sequence[Unit], levels: Sequence[Level]) -> Iterator[tuple[Unit, int, int]]:
    """Yield (unit, bits, how many of its micro-experts get them)."""
    left = [list(level) for level in levels]
    for unit in ranked:
        missing = unit.size
        while missing:
            while not left[0][1]:
                left.pop(0)
            taken = min(missing, left[0][1])
            left[0][1] -= taken
            missing -= taken
            yield unit, left[0][0], taken
