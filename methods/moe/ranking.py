"""Rank micro-experts by score within a layer, within an expert, or over the whole model.

Pure functions of energies [N] in flat order. Ties are broken by index, so that a ranking is the
same on every device and in every run.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from bench.models.structure.moe_block import MoEBlock
from methods.moe.calibration import squared_column_norms
from methods.moe.micro_experts import expert_spans, expert_view


def lowest(energy_N: Tensor, count: int) -> Tensor:
    """Return the flat indices of the `count` lowest energies, in ascending order of index."""
    order_N = torch.argsort(energy_N, stable=True)
    return order_N[:count].sort().values


def lowest_per_expert(energy_N: Tensor, spans: Sequence[slice], count: int) -> Tensor:
    """Return the `count` lowest indices, with the same share of micro-experts from every expert.

    Shares that are not whole numbers are rounded by largest remainder, so that exactly `count`
    micro-experts are removed.
    """
    widths = [span.stop - span.start for span in spans]
    return lowest_of_each(energy_N, spans, apportion(widths, count))


def lowest_of_each(energy_N: Tensor, spans: Sequence[slice], losses: Sequence[int]) -> Tensor:
    """Return the flat indices of each expert's lowest energies; `losses` gives their numbers."""
    chosen = [
        span.start + lowest(energy_N[span], loss) for span, loss in zip(spans, losses, strict=True)
    ]
    return torch.cat(chosen)


def aligned_losses(block: MoEBlock, share: Fraction, align: int) -> list[int]:
    """Return how many micro-experts each expert loses so that all keep the same aligned width.

    The order is the flat one, shared experts first. Routed experts keep the multiple of `align`
    nearest to (1 - `share`) times the widest expert, at least `align`, and no more than they have.
    Shared experts that are c times as wide keep c times as many, because the config of such models
    (DeepSeek) states one width for both; other shared experts keep the multiple nearest to their
    own share.
    """
    widest = max(block.widths)
    kept = _nearest_multiple((1 - share) * widest, align)
    losses = [max(0, width - kept) for width in block.widths]
    if block.shared is None:
        return losses
    times, rest = divmod(block.d_shared, widest)
    own = _nearest_multiple((1 - share) * block.d_shared, align) if rest else times * kept
    return [max(0, block.d_shared - own), *losses]


def _nearest_multiple(size: Fraction, align: int) -> int:
    """Return the multiple of `align` nearest to a size (ties round up), at least `align`."""
    return align * max(1, math.floor(size / align + Fraction(1, 2)))


def lowest_overall(energies: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return the indices to remove from each layer when all layers are ranked together."""
    sizes = [len(energy_N) for energy_N in energies]
    chosen = torch.zeros(sum(sizes), dtype=torch.bool)
    # On the CPU: the layers of a device map are on different devices.
    chosen[lowest(torch.cat([energy_N.cpu() for energy_N in energies]), count)] = True
    return [part.nonzero().flatten() for part in torch.split(chosen, sizes)]


def energy_share(energy_N: Tensor, indices: Tensor) -> float:
    """Return the fraction of the summed energy at the indices; 0 if there is no energy at all."""
    total = float(energy_N.sum())
    return float(energy_N[indices].sum()) / total if total else 0.0


def apportion(sizes: Sequence[int], count: int) -> list[int]:
    """Divide `count` in proportion to `sizes`, by largest remainder; ties by index."""
    total = sum(sizes)
    # Integers throughout: floats would decide ties by rounding.
    shares = [size * count // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(sizes[i] * count % total))
    for place in by_remainder[: count - sum(shares)]:
        shares[place] += 1
    return shares


def random_scores(block: MoEBlock, seed: int) -> Tensor:
    """Return a random score for every micro-expert of a block, float32 [N]."""
    # Seeded by name, so that the scores of a block do not depend on the other blocks.
    rng = random.Random(f"{seed}:{block.name}")
    return torch.tensor([rng.random() for _ in range(block.micro_experts)])


def magnitudes(block: MoEBlock) -> Tensor:
    """Return ‖w‖₂² of every micro-expert of a block, float64 [N]."""
    # The square ranks like the norm itself and needs no root.
    return torch.cat(
        [squared_column_norms(expert_view(block, expert).down) for expert, _ in expert_spans(block)]
    )
