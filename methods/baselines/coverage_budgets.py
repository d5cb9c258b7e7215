"""MoE-Slimming's budgets: how many micro-experts each layer and each routed expert keeps.

Shapes: L layers, E routed experts of a layer, F an expert's width, N micro-experts that are ranked.

With micro-experts sorted by decreasing score v, the share r of the total score is *covered* by the
shortest prefix whose sum reaches it. Micro-expert j is thus kept once r exceeds

    c_j = (Σ_{i<j} v_i) / Σ_i v_i,        or j / N if the sum is zero

Layers and experts have weights u, and each covers the share r = λ u. The official code bisects λ in
32 steps until the number of kept micro-experts is close to the target, and corrects the rest one by
one. But c_j / u is the value of λ above which micro-expert j is kept, so keeping the smallest of
these values gives the limit of the bisection with exactly the target number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from methods.moe.ranking import apportion, lowest_overall

SMOOTHINGS = 4  # as in the code; its comment says two
LEAST_WEIGHT = 1e-6


def covered_before(score_N: Tensor) -> Tensor:
    """Return c, float64 [N]: the share covered before each micro-expert, by decreasing score."""
    sorted_N = score_N.double().clamp_min(0).sort(descending=True).values
    if not sorted_N.any():
        sorted_N = torch.ones_like(sorted_N)
    sum_N = sorted_N.cumsum(0)
    return (sum_N - sorted_N).clamp_min(0) / sum_N[-1:]


def keep_by_coverage(scores: Sequence[Tensor], weights: Sequence[float], keep: int) -> list[int]:
    """Return how many members of each group to keep, `keep` in total; group g covers λ u_g.

    `scores` holds one tensor [N] and `weights` one positive weight u per group. Ties go to the
    first group.
    """
    entries = [
        covered_before(score_N) / weight for score_N, weight in zip(scores, weights, strict=True)
    ]
    return [len(chosen) for chosen in lowest_overall(entries, keep)]


def layer_weights(loss_L: Tensor) -> list[float]:
    """Return the weight of each layer from its relative loss [L]; their mean is one.

    Four times the root, then a clamp to one (unbiased) standard deviation around the mean.
    """
    weight_L = loss_L.double()
    for _ in range(SMOOTHINGS):
        weight_L = weight_L.sqrt()
        if len(weight_L) > 1:
            deviation, mean = torch.std_mean(weight_L)
            weight_L = weight_L.clamp(mean - deviation, mean + deviation)
    mean = weight_L.mean()
    # If all losses are zero, for example because all routed experts are, layers are equal.
    weight_L = weight_L / mean if mean > 0 else torch.ones_like(weight_L)
    found: list[float] = weight_L.clamp_min(LEAST_WEIGHT).tolist()
    return found


def expert_weights(score_E: Tensor) -> list[float]:
    """Return the weight of each expert of a layer, √max(s, 0) normalised to a sum of one, [E]."""
    weight_E = score_E.double().clamp_min(0).sqrt()
    total = weight_E.sum()
    if total > 0:
        weight_E = weight_E / total
    found: list[float] = weight_E.clamp_min(LEAST_WEIGHT).tolist()
    return found


def rounded_widths(
    widths: Sequence[Sequence[int]], full: Sequence[Sequence[int]], multiple: int, least: int
) -> list[list[int]]:
    """Return widths that are multiples of `multiple`, and zero or at least `least`.

    `widths` [L, E] are rounded down, and those below `least` become zero. The width freed by this
    is given back in whole multiples: to layers in proportion to the room of their remaining experts
    up to `full` [L, E], and within a layer first to the largest remainders, then in proportion to
    room. If there is not enough room, the widest experts that became zero get `least` back. The sum
    changes by at most half of `multiple` or `least`, whichever is greater.
    """
    smallest = max(multiple, math.ceil(least / multiple) * multiple)
    kept = [[width // multiple * multiple for width in layer] for layer in widths]
    kept = [[width if width >= smallest else 0 for width in layer] for layer in kept]
    # The widest last, from where it is taken first. Experts below `smallest` cannot get it back.
    lost = sorted(
        (
            (-width, number, expert)
            for number, layer in enumerate(widths)
            for expert, width in enumerate(layer)
            if kept[number][expert] == 0 and width and full[number][expert] >= smallest
        ),
        reverse=True,
    )
    while True:
        # In multiples, as are the pieces below.
        rooms = [
            [(most - width) // multiple if width else 0 for width, most in zip(*pair, strict=True)]
            for pair in zip(kept, full, strict=True)
        ]
        by_layer = [sum(room) for room in rooms]
        freed = sum(map(sum, widths)) - sum(map(sum, kept))
        # What does not fit into the remaining experts revives another one if it is nearer to
        # `smallest` than to zero. That expert adds room, so both are computed again.
        if not lost or freed - multiple * sum(by_layer) < smallest / 2:
            break
        _, number, expert = lost.pop()
        kept[number][expert] = smallest
    # The nearest number of pieces. It is negative if the last expert took more than was free.
    pieces = min((freed + multiple // 2) // multiple, sum(by_layer))
    if pieces <= 0:
        return kept
    for number, share in enumerate(apportion(by_layer, pieces)):
        remainders = [width % multiple for width in widths[number]]
        for expert, more in enumerate(_given_back(share, remainders, rooms[number])):
            kept[number][expert] += more * multiple
    return kept


def _given_back(pieces: int, remainders: Sequence[int], rooms: Sequence[int]) -> list[int]:
    """Return how many of a layer's pieces each expert gets, at most its room.

    The largest remainders get one piece each, and what is left is divided in proportion to the rest
    of the room.
    """
    experts = [expert for expert, remainder in enumerate(remainders) if remainder and rooms[expert]]
    first = sorted(experts, key=lambda expert: -remainders[expert])[:pieces]
    given = [int(expert in first) for expert in range(len(remainders))]
    left = pieces - len(first)
    if not left:
        return given
    more = apportion([room - one for room, one in zip(rooms, given, strict=True)], left)
    return [one + further for one, further in zip(given, more, strict=True)]
