"""Allocate a budget: micro-experts to remove per layer, or bits per micro-expert.

Shapes: N micro-experts of a layer, F width of an expert.

Removal: the predicted error of a layer that loses its n lowest-energy micro-experts is the sum of
their energies, relative to the power of the layer's output. Each further micro-expert adds at least
as much as the one before it, so a greedy choice minimises the total error: rank the micro-experts
of all layers together, and take no more from a layer that has reached its limit.

Bits (CAMERA-Q): micro-experts with more energy get more bits, at an exact mean per layer. The
micro-experts of an expert are sorted by energy and cut into blocks. Bits are allocated per block,
so that they change only at the end of a quantization group of the down matrix. A block is split
only if the size of a level is not a multiple of the block size.
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
    """Return how many micro-experts to remove per layer so that their summed energy is least.

    `energies` holds one tensor [N] per layer, relative to the power of the layer's output; at α = 0
    they are the predicted squared error. No layer loses more than the fraction `limit` of its
    micro-experts.

    Raises:
        UserError: the limits allow less than `budget` in total.
    """
    limits = [math.floor(limit * len(energy_N)) for energy_N in energies]
    if sum(limits) < budget:
        raise UserError(
            f"layer_limit={limit} allows removing {sum(limits)} micro-experts, but the ratio needs "
            f"{budget}: raise layer_limit or lower the ratio"
        )
    # Sorted ascending, a layer's error is convex in the number removed, and any prefix of the joint
    # ranking takes a prefix of every layer. Cutting each layer at its limit keeps that.
    steps = [energy_N.cpu().sort().values[:n] for energy_N, n in zip(energies, limits, strict=True)]
    layer_of_step = torch.cat([torch.full((len(step),), i) for i, step in enumerate(steps)])
    # Stable: ties go to the earlier layer, on every device.
    order = torch.argsort(torch.cat(steps), stable=True)[:budget]
    return torch.bincount(layer_of_step[order], minlength=len(energies)).tolist()


BitScope = Literal["layer", "expert"]
BLOCKS_PER_EXPERT = 8
# A block is one group if the narrowest expert holds at least this many groups.
GROUPS_PER_EXPERT = 4


@dataclass(frozen=True)
class RankedBlock:
    """Micro-experts that are consecutive in the energy order of their expert; sorts by `key`."""

    expert: int
    size: int
    key: tuple[float, float]


def energy_order(energy_F: Tensor) -> Tensor:
    """Return the indices that sort energies in descending order; ties keep their order."""
    return torch.argsort(energy_F, descending=True, stable=True)


def block_size(widths: Sequence[int], group: int) -> int:
    """Return the default number of micro-experts that change their bits together.

    One group, or an eighth of an expert narrower than four groups, so that every expert can contain
    several levels.
    """
    # Experts of width 0 hold nothing and must not set the block size.
    narrowest = min((width for width in widths if width), default=1)
    # A smaller block would split a group wherever the bits change, and each part would store a grid
    # of its own: 2.2625 bits instead of 2.25 at width 768 (Qwen3-30B).
    if narrowest >= GROUPS_PER_EXPERT * group:
        return group
    return min(group, max(1, narrowest // BLOCKS_PER_EXPERT))


def block_lengths(size: int, block: int) -> list[int]:
    """Return the sizes of an expert's blocks; the last one may be smaller."""
    return [min(block, size - start) for start in range(0, size, block)]


def rank_blocks(energies: Sequence[Tensor], block: int, scope: BitScope) -> list[RankedBlock]:
    """Return the blocks of all experts, sorted so that the first should get the most bits.

    With scope `layer`, blocks are sorted by mean energy. With scope `expert`, every expert gets its
    share of each level: blocks are sorted by their relative rank within their own expert, and by
    mean energy among equal ranks.
    """
    blocks = []
    for expert, energy_F in enumerate(energies):
        sizes = block_lengths(len(energy_F), block)
        ordered_F = energy_F.sort(descending=True, stable=True).values
        for position, part in enumerate(torch.split(ordered_F, sizes) if sizes else ()):
            # The mean, not the sum: the last block of an expert may be smaller.
            mean = float(part.mean())
            rank = position / len(sizes) if scope == "expert" else 0.0
            blocks.append(RankedBlock(expert, len(part), (rank, -mean)))
    return sorted(blocks, key=lambda ranked: ranked.key)


def distribute_levels(
    ranked: Sequence[RankedBlock], levels: Sequence[Level], experts: int
) -> list[list[Level]]:
    """Assign the levels, most bits first, to the blocks in order; return the levels of each expert.

    The sizes of the levels must sum to the sizes of the blocks. The blocks of an expert keep their
    order in the ranking, so its levels apply to its micro-experts in order of descending energy.
    """
    # Insertion order is the order of `levels`, so each expert's levels come out with falling bits.
    sizes = [dict.fromkeys((level.bits for level in levels), 0) for _ in range(experts)]
    for unit, bits, taken in _assign_levels(ranked, levels):
        sizes[unit.expert][bits] += taken
    return [[Level(bits, size) for bits, size in counts.items() if size] for counts in sizes]


def _assign_levels(
    ranked: Sequence[RankedBlock], levels: Sequence[Level]
) -> Iterator[tuple[RankedBlock, int, int]]:
    """Yield (block, bits, number of micro-experts of the block that get these bits)."""
    left = [list(level) for level in levels]
    for unit in ranked:
        missing = unit.size
        # A block crosses into the next level when the current one is used up, so at most one block
        # is split at each boundary between levels.
        while missing:
            while not left[0][1]:
                left.pop(0)
            taken = min(missing, left[0][1])
            left[0][1] -= taken
            missing -= taken
            yield unit, left[0][0], taken
