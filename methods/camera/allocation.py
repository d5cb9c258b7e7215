"""How many micro-experts each layer loses, when a budget for the whole model is shared out.

Shapes: N micro-experts of a layer.

The predicted error of a layer that loses its n micro-experts of least energy is the sum of their
energies, relative to the power of the layer's output. It grows by more with every micro-expert,
so the least total over all ways to share the budget is found by always taking the next one where
it costs least: a ranking of all layers together, in which a layer drops out at its limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.errors import UserError


def allocate(energies: Sequence[Tensor], budget: int, limit: float) -> list[int]:
    """Return how many of each layer's micro-experts go so that the summed energy is least.

    `energies` [N] are relative to the power of their layer's output, at α = 0 the predicted
    squared error. No layer loses more than the share `limit` of its micro-experts.

    Raises:
        UserError: the limits together are below the budget.
    """
    most = [math.floor(limit * len(energy_N)) for energy_N in energies]
    if sum(most) < budget:
        raise UserError(
            f"layer_limit={limit} lets {sum(most)} micro-experts go, but the ratio asks {budget}"
        )
    steps = [energy_N.cpu().sort().values[:n] for energy_N, n in zip(energies, most, strict=True)]
    owner = torch.cat([torch.full((len(step),), i) for i, step in enumerate(steps)])
    order = torch.argsort(torch.cat(steps), stable=True)[:budget]
    return torch.bincount(owner[order], minlength=len(energies)).tolist()
