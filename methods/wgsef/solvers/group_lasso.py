"""Group lasso: lambda sum_j sqrt|s_j| ||v_j|| by Prox-SG, and in Adam's metric (ProxSSI).

Shapes: M groups of all families.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.wgsef.groups.partition import Partition
from methods.wgsef.solvers.solver import Scene, Solver
from methods.wgsef.training.optimizers import Stepping

_PASSES = 10


class GroupLasso(Solver):
    """Prox-SG with the block soft threshold; `strength` decides the number of groups it leaves."""

    def __init__(self, scene: Scene, strength: float) -> None:
        super().__init__(scene)
        self._strength = strength

    def shrink(self, optimizer: Stepping) -> None:
        """Apply v_j = max(0, 1 - lam sqrt|s_j| / ||t_j||) t_j."""
        lam = optimizer.rate * self._strength
        threshold_M = lam * lasso_weights(self.partition)
        self.partition.scale_(lasso_scale(self.partition.norms(), threshold_M))


class AdaptiveGroupLasso(Solver):
    """Group lasso in the diagonal metric H of the optimizer (ProxSSI: Deleu and Bengio, 2021).

    The proximal point is v_i = H_i r / (H_i r + lam w_j) t_i, where r = ||v_j|| solves
    sum_i (H_i t_i / (H_i r + lam w_j))^2 = 1; it is zero where ||H t_j|| <= lam w_j.
    """

    def __init__(self, scene: Scene, strength: float) -> None:
        super().__init__(scene)
        self._strength = strength

    def shrink(self, optimizer: Stepping) -> None:
        """Solve for all norms r at once and apply the factors, which vary inside groups."""
        lam_M = optimizer.rate * self._strength * lasso_weights(self.partition)
        parameters = self.partition.owned_parameters()
        metric = {name: optimizer.metric(weight) for name, weight in parameters.items()}
        radius_M = self._radii(metric, lam_M)
        radius, lam = self.partition.spread(radius_M), self.partition.spread(lam_M)
        for name, weight in parameters.items():
            raised = metric[name] * radius[name]
            # Weights that no group owns have lam 0 and radius 0, and are left unchanged.
            factor = torch.where(lam[name] > 0, raised / (raised + lam[name]), 1.0)
            weight.mul_(factor.to(weight.dtype))

    def _radii(self, metric: dict[str, Tensor], lam_M: Tensor) -> Tensor:
        """Return the norms r_j = ||v_j|| [M] of the proximal point.

        q(r) = (sum_i (H_i t_i / (H_i r + lam w))^2)^(-1/2) equals 1 at the root.
        """
        # q is concave and increasing (as in `envelope_elementwise`), so Newton from r = 0 stays
        # below the root. Where q(0) >= 1, i.e. ||H t|| <= lam w, the clamped step is 0 and the
        # group stays zero.
        radius_M = torch.zeros_like(lam_M)
        lam = self.partition.spread(lam_M)
        parameters = self.partition.parameters
        for _ in range(_PASSES):
            radius = self.partition.spread(radius_M)
            total = {name: metric[name] * radius[name] + lam[name] for name in metric}
            power = {n: (metric[n] * parameters[n] / total[n]).square() for n in metric}
            power_M = self.partition.sum_named(power.__getitem__)
            # The lambda is called within the iteration, so binding the loop variables late is safe
            # (B023).
            bend_M = self.partition.sum_named(lambda n: power[n] * metric[n] / total[n])  # noqa: B023
            q_M = power_M.rsqrt()
            step_M = (1 - q_M).clamp(min=0) * power_M / (q_M * bend_M)
            radius_M = radius_M + torch.where(power_M > 0, step_M, 0.0)
        return radius_M


def lasso_weights(partition: Partition) -> Tensor:
    """Return sqrt|s_j|, the root of the number of weights of each group, [M]."""
    return partition.elements_M.sqrt()


def lasso_scale(norm_M: Tensor, threshold_M: Tensor) -> Tensor:
    """Return the factors max(0, 1 - threshold / ||t_j||) [M] of the block soft threshold."""
    return torch.where(norm_M > threshold_M, 1 - threshold_M / norm_M, 0.0)
