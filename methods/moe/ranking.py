"""Ranking of micro-experts by score: within a layer, an expert, or the whole model.

Pure functions on energies [N] in flat order. Ties are broken by index, so that a ranking is the
same on every device and in every run.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """Return `count` indices such that each expert loses the same share of its micro-experts.

    Fractional shares are rounded by largest remainder, so as many are removed as in a ranking over
    the whole layer.
    """
    widths = [span.stop - span.start for span in spans]
    shares = apportion(widths, count)
    chosen = [
        span.start + lowest(energy_N[span], share)
        for span, share in zip(spans, shares, strict=True)
    ]
    return torch.cat(chosen)


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


def magnitudes(block: MoEBlock) -> Tensor:
    """Return ‖w‖₂² of every micro-expert of a block, float64 [N]."""
    # Squared, which ranks like the norm itself and saves a root.
    return torch.cat(
        [squared_column_norms(expert_view(block, expert).down) for expert, _ in expert_spans(block)]
    )
