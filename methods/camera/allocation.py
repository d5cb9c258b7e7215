"""Division of a model-wide budget of micro-experts among the layers.

Shapes: N micro-experts of a layer.

The predicted error of a layer that loses its n micro-experts of least energy is the sum of their
energies, relative to the power of the layer's output. Its increments grow with n, so the least
total over all divisions of the budget is found greedily: a ranking of all layers together, in which
a layer drops out at its limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.errors import UserError


def allocate(energies: Sequence[Tensor], budget: int, limit: float) -> list[int]:
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
