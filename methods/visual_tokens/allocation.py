"""Choice of heads, neurons and the layer cut from calibration statistics.

Shapes: L layers, H query heads, F neurons of one feed-forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bench.errors import UserError
from methods.visual_tokens.calibration_stats import CalibrationStats

# Kept query heads of every layer, and kept neurons [f] of every feed-forward of every layer.
KeptHeads = list[tuple[int, ...]]
KeptNeurons = list[tuple[Tensor, ...]]

# How heads or neurons are ranked: by calibration or, as controls, by number or at random.
Ranking = Literal["scored", "first", "random"]


def heads_above(score_LH: Tensor, threshold: float, whole_layers: int) -> KeptHeads:
    """Keep the heads whose score exceeds the threshold, and all heads of the first layers."""
    keep_LH = score_LH > threshold
    keep_LH[:whole_layers] = True
    return _head_numbers(keep_LH)


def top_heads_by_count(score_LH: Tensor, counts: Sequence[int]) -> KeptHeads:
    """Keep the given number of top-scoring heads in every layer.

    Raises:
        UserError: a layer has fewer heads.
    """
    heads = score_LH.shape[1]
    wrong = [count for count in counts if not 0 <= count <= heads]
    if wrong:
        raise UserError(f"counts has {wrong[0]}, but a layer can keep 0 to {heads} heads")
    keep_LH = torch.zeros_like(score_LH, dtype=torch.bool)
    for layer, count in enumerate(counts):
        keep_LH[layer, score_LH[layer].topk(count).indices] = True
    return _head_numbers(keep_LH)


def top_heads_by_share(
    score_LH: Tensor, share: float, whole_layers: int, reached: int
) -> KeptHeads:
    """Keep the top share of heads among the first `reached` layers, by one ranking of all heads.

    Raises:
        UserError: the layers that stay whole have more heads than that.
    """
    heads = score_LH.shape[1]
    return top_heads_in_total(score_LH, round(share * reached * heads), whole_layers, reached)


def top_heads_in_total(score_LH: Tensor, total: int, whole_layers: int, reached: int) -> KeptHeads:
    """Keep the `total` top heads of the first `reached` layers, and all of `whole_layers`.

    Raises:
        UserError: the layers that stay whole have more than `total` heads.
    """
    heads = score_LH.shape[1]
    whole = min(whole_layers, reached)
    rest = total - whole * heads
    if rest < 0:
        raise UserError(
            f"{total} heads in {reached} layers cannot be kept: the first {whole}, which stay "
            f"whole, have {whole * heads}; raise keep or lower whole_layers"
        )
    keep_LH = torch.zeros_like(score_LH, dtype=torch.bool)
    keep_LH[:whole] = True
    # One ranking over all layers is equivalent to one threshold, but `topk` keeps exactly the total
    # even if scores are equal.
    keep_LH[whole:reached].view(-1)[score_LH[whole:reached].flatten().topk(rest).indices] = True
    return _head_numbers(keep_LH)


def top_neurons(score_F: Tensor, share: float) -> Tensor:
    """Return the top share of a feed-forward's neurons, at least one if there are any."""
    return score_F.topk(min(len(score_F), max(1, int(share * len(score_F))))).indices


def top_neurons_of_layers(scores: Sequence[Sequence[Tensor]], share: float) -> KeptNeurons:
    """Return the top share of neurons of every feed-forward of every layer."""
    return [tuple(top_neurons(score_F, share) for score_F in units) for units in scores]


def control_scores(ranking: Ranking, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Return scores that rank units by number (`first`) or at random, one tensor per size."""
    if ranking == "first":
        # Descending scores, so that the first units are ranked highest.
        return [-torch.arange(size, dtype=torch.float32) for size in sizes]
    # One generator for all sizes, so that layers keep different units.
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(size, generator=generator) for size in sizes]


def earliest_cut(stats: CalibrationStats, max_kl: float) -> int:
    """Return the smallest cut whose KL divergence from the dense answer is within `max_kl` nats."""
    depth = len(stats.cut_kl)
    fitting = [cut for cut in range(1, depth + 1) if stats.cut_kl[cut - 1] <= max_kl]
    return fitting[0] if fitting else depth


def _head_numbers(keep_LH: Tensor) -> KeptHeads:
    return [tuple(layer_H.nonzero()[:, 0].tolist()) for layer_H in keep_LH]
