"""Division of a budget: micro-experts to remove among layers, bits among micro-experts.

Shapes: N micro-experts of a layer, F an expert's width.

Removal: the predicted error of a layer that loses its n micro-experts of least energy is the sum of
their energies, relative to the power of the layer's output. Its increments grow with n, so the
least total over all divisions of the budget is found greedily: a ranking of all layers together, in
which a layer drops out at its limit.

Bits in CAMERA-Q: more for more energy, at an exact mean per layer. The micro-experts of an expert
are ordered by energy and cut into blocks, the unit of allocation, so that bits change only where a
group of the down matrix ends anyway. A block is divided only where the size of a level is not a
whole number of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bench.errors import UserError
from bench.models.bitpacking.packed_shape import Level


def allocate_least_error(energies: Sequence[Tensor], budget: int, limit: float) -> list[int]:
    """Return the number of micro-experts to remove per layer, of least summed energy.

    `energies` [N] are relative to the power of their layer's output; at α = 0 they are the
    predicted squared error. No layer loses more than the fraction `limit` of its micro-experts.

    Raises:
        UserError: the limits do not add up to the budget.
    """
    most = [math.floor(limit * len(energy_N)) for energy_N in energies]
    if sum(most) < budget:
        raise UserError(
            f"layer_limit={limit} allows removing {sum(most)} micro-experts, but the ratio needs "
            f"{budget}: raise layer_limit or lower the ratio"
        )
    # Sorted ascending, a layer's error is convex in the number removed, and any prefix of the joint
    # ranking takes a prefix of every layer. Cutting each layer at its limit keeps that.
    steps = [energy_N.cpu().sort().values[:n] for energy_N, n in zip(energies, most, strict=True)]
    owner = torch.cat([torch.full((len(step),), i) for i, step in enumerate(steps)])
    # Stable: ties go to the earlier layer, on every device.
    order = torch.argsort(torch.cat(steps), stable=True)[:budget]
    return torch.bincount(owner[order], minlength=len(energies)).tolist()


BitScope = Literal["layer", "expert"]
BLOCKS_PER_EXPERT = 8
# With at least so many whole groups in an expert, a block is a group.
GROUPS_PER_EXPERT = 4


@dataclass(frozen=True)
class RankedBlock:
    """A block of consecutive micro-experts of one expert, in order of energy; ranked by `key`."""

    expert: int
    size: int
    key: tuple[float, float]


def energy_order(energy_F: Tensor) -> Tensor:
    """Return the order of falling energy; ties keep their order."""
    return torch.argsort(energy_F, descending=True, stable=True)


def block_size(widths: Sequence[int], group: int) -> int:
    """Return the default number of micro-experts that change their bits together.

    One group, or an eighth of an expert narrower than four groups, so that every expert can contain
    several levels.
    """
    # Experts of width 0 hold nothing and must not set the block size.
    narrowest = min((width for width in widths if width), default=1)
    # A smaller block would cut groups at every change of bits: 2.2625 bits in place of 2.25 at the
    # width 768 of Qwen3-30B.
    if narrowest >= GROUPS_PER_EXPERT * group:
        return group
    return min(group, max(1, narrowest // BLOCKS_PER_EXPERT))


def block_lengths(size: int, block: int) -> list[int]:
    """Return the sizes of an expert's blocks; the last one may be smaller."""
    return [min(block, size - start) for start in range(0, size, block)]


def rank_blocks(energies: Sequence[Tensor], block: int, scope: BitScope) -> list[RankedBlock]:
    """Return the blocks of all experts, the one that deserves most bits first.

    With scope `layer`, blocks compare by their mean energy. With scope `expert`, every expert gets
    its share of each level: blocks compare by their relative rank within their own expert, and by
    energy only among equal ranks.
    """
    found = []
    for expert, energy_F in enumerate(energies):
        sizes = block_lengths(len(energy_F), block)
        ordered_F = energy_F.sort(descending=True, stable=True).values
        for place, part in enumerate(torch.split(ordered_F, sizes) if sizes else ()):
            # The mean, not the sum: the last block of an expert may be smaller.
            mean = float(part.mean())
            rank = place / len(sizes) if scope == "expert" else 0.0
            found.append(RankedBlock(expert, len(part), (rank, -mean)))
    return sorted(found, key=lambda unit: unit.key)


def distribute_levels(
    ranked: Sequence[RankedBlock], levels: Sequence[Level], experts: int
) -> list[list[Level]]:
    """Assign the levels, most bits first, to blocks in order; return each expert's levels.

    The sizes of the levels sum to those of the blocks. An expert's first block precedes its second,
    so its levels follow its micro-experts in order of energy.
    """
    # Insertion order is the order of `levels`, so each expert's levels come out with falling bits.
    sizes = [dict.fromkeys((level.bits for level in levels), 0) for _ in range(experts)]
    for unit, bits, taken in _assign_levels(ranked, levels):
        sizes[unit.expert][bits] += taken
    return [[Level(bits, size) for bits, size in counts.items() if size] for counts in sizes]


def _assign_levels(
    ranked: Sequence[RankedBlock], levels: Sequence[Level]
) -> Iterator[tuple[RankedBlock, int, int]]:
    """Yield (block, bits, number of its micro-experts that get them)."""
    left = [list(level) for level in levels]
    for unit in ranked:
        missing = unit.size
        # A block crosses into the next level when the current one is used up: at most one block per
        # boundary between levels is divided.
        while missing:
            while not left[0][1]:
                left.pop(0)
            taken = min(missing, left[0][1])
            left[0][1] -= taken
            missing -= taken
            yield unit, left[0][0], taken
