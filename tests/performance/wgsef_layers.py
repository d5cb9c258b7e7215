"""Many layers in one batched equation over a Python loop over layers."""

from __future__ import annotations

import torch

from methods.wgsef.prox.operators import prox_envelope
from methods.wgsef.prox.root import newton_root, newton_root_fixed_passes
from tests.performance.figure import Figure
from tests.performance.interleaved import ratio, times

LAYERS, GROUPS = 64, 2048
GOAL = 5.0


def figures() -> list[Figure]:
    """Measure 64 layers of 2,048 groups in fp64, each keeping a quarter."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    norm_LM = torch.rand(LAYERS, GROUPS, dtype=torch.float64)
    layers = [norm_LM[i : i + 1] for i in range(LAYERS)]
    found = []
    for root in (newton_root, newton_root_fixed_passes):
        one_by_one, together = times(
            [
                lambda root=root: [
                    prox_envelope(row, GROUPS // 4, 0.01, root=root) for row in layers
                ],
                lambda root=root: prox_envelope(norm_LM, GROUPS // 4, 0.01, root=root),
            ],
            rounds=15,
        )
        value, median = ratio(one_by_one, together)
        how = f"minimum of 15, interleaved; median {median:.1f}"
        name = f"loop over {LAYERS} layers / batched, {GROUPS} groups each, {root.__name__}"
        found.append(Figure(name, value, f">= {GOAL:g}", value >= GOAL, how))
    return found
