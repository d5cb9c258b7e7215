"""Group lasso, and half-space steps on it: HSPG (Chen et al., 2020), AdaHSPG+ (Dai et al., 2023).

Shapes: M groups of all families.

Group lasso, lambda sum_j sqrt|s_j| ||v_j||, is solved by Prox-SG or in Adam's metric (ProxSSI). A
half-space step goes from x to y = x - alpha (gradient of loss and regulariser at x). Each group
whose y has left the half-space { y : <y, x> >= eps ||x||^2 } is set to zero; zero groups stay zero
(WGSEF specification section 4).
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.solvers.optimizers import ProximalOptimizer
from methods.wgsef.solvers.solver import Solver, SolverContext

_NEWTON_PASSES = 10


class GroupLassoSolver(Solver):
    """Prox-SG with the block soft threshold; `strength` determines how many groups are left."""

    def shrink(self, optimizer: ProximalOptimizer) -> None:
        """Apply v_j = max(0, 1 - lam sqrt|s_j| / ||t_j||) t_j."""
        soft_threshold_(self.partition, self.lam)


class AdaptiveGroupLassoSolver(Solver):
    """Group lasso in the diagonal metric H of the optimizer (ProxSSI: Deleu and Bengio, 2021).

    The proximal point is v_i = H_i r / (H_i r + lam w_j) t_i, where r = ||v_j|| solves
    sum_i (H_i t_i / (H_i r + lam w_j))^2 = 1; it is zero where ||H t_j|| <= lam w_j.
    """

    def shrink(self, optimizer: ProximalOptimizer) -> None:
        """Solve for all norms r at once and apply the factors, which vary inside groups."""
        lam_M = self.lam * lasso_weights(self.partition)
        parameters = self.partition.owned_parameters()
        metric = {name: optimizer.metric(weight) for name, weight in parameters.items()}
        radius_M = self._radii(metric, lam_M)
        radius, lam = (
            self.partition.expand_to_weights(radius_M),
            self.partition.expand_to_weights(lam_M),
        )
        for name, weight in parameters.items():
            raised = metric[name] * radius[name]
            # Weights that no group owns have lam 0 and radius 0, and are left unchanged.
            factor = torch.where(lam[name] > 0, raised / (raised + lam[name]), 1.0)
            weight.mul_(factor.to(weight.dtype))

    def _radii(self, metric: dict[str, Tensor], lam_M: Tensor) -> Tensor:
        """Return the norms r_j = ||v_j|| [M] of the proximal point.

        q(r) = (sum_i (H_i t_i / (H_i r + lam w))^2)^(-1/2) equals 1 at the root.
        """
        # q is concave and increasing (specification 1.3), so Newton's iteration from r = 0 stays
        # below the root. If q(0) >= 1, i.e. ||H t|| <= lam w, the clamped step is 0 and so is r.
        radius_M = torch.zeros_like(lam_M)
        lam = self.partition.expand_to_weights(lam_M)
        parameters = self.partition.parameters
        for _ in range(_NEWTON_PASSES):
            radius = self.partition.expand_to_weights(radius_M)
            total = {name: metric[name] * radius[name] + lam[name] for name in metric}
            power = {n: (metric[n] * parameters[n] / total[n]).square() for n in metric}
            power_M = self.partition.sum_named(power.__getitem__)
            # B023 does not apply: the lambda is called within this iteration.
            bend_M = self.partition.sum_named(lambda n: power[n] * metric[n] / total[n])  # noqa: B023
            q_M = power_M.rsqrt()
            step_M = (1 - q_M).clamp(min=0) * power_M / (q_M * bend_M)
            radius_M = radius_M + torch.where(power_M > 0, step_M, 0.0)
        return radius_M


def lasso_weights(partition: GroupPartition) -> Tensor:
    """Return sqrt|s_j|, the root of the number of weights of each group, [M]."""
    return partition.elements_M.sqrt()


def lasso_scale(norm_M: Tensor, threshold_M: Tensor) -> Tensor:
    """Return the factors max(0, 1 - threshold / ||t_j||) [M] of the block soft threshold."""
    return torch.where(norm_M > threshold_M, 1 - threshold_M / norm_M, 0.0)


def soft_threshold_(partition: GroupPartition, lam: float) -> None:
    """Apply the proximal operator of lam times group lasso to all groups, in place."""
    partition.scale_(lasso_scale(partition.norms(), lam * lasso_weights(partition)))


class HalfSpaceSolver(Solver):
    """A proximal phase, then half-space steps, for a regulariser given by a subclass."""

    def __init__(
        self,
        context: SolverContext,
        strength: float | None,
        epsilon: float = 0.0,
        warmup: float = 0.25,
    ) -> None:
        super().__init__(context, strength)
        self._epsilon, self._warmup = epsilon, warmup
        self._start_weights: dict[str, Tensor] = {}

    @abstractmethod
    def proximal_step(self, optimizer: ProximalOptimizer) -> None:
        """Apply the proximal operator of the regulariser to the weights."""

    @abstractmethod
    def gradient_factor(self, norm_M: Tensor, optimizer: ProximalOptimizer) -> Tensor:
        """Return the factor [M] of x in the regulariser's gradient; finite for empty groups."""

    def in_half_space_phase(self) -> bool:
        """Return whether the next step is a half-space step."""
        return self.progress >= self._warmup

    def before_step(self, optimizer: ProximalOptimizer) -> None:
        """Store the weights from which a half-space step starts."""
        if self.in_half_space_phase():
            self._start_weights = self.partition.copy_weights()

    def shrink(self, optimizer: ProximalOptimizer) -> None:
        """Apply the proximal operator, or complete the half-space step that the optimizer began."""
        # `before_step` decided the phase; `progress` has changed since.
        if self._start_weights:
            self._half_space_step(optimizer)
            self._start_weights = {}
        else:
            self.proximal_step(optimizer)

    def _half_space_step(self, optimizer: ProximalOptimizer) -> None:
        square_M = self.partition.sum_named(lambda name: self._start_weights[name].square())
        # The optimizer has taken the step along the gradient of the loss. That of the regulariser,
        # at x, is added here, so that momentum and Adam's metric do not distort it.
        factor_M = -self.lam * self.gradient_factor(square_M.sqrt(), optimizer)
        self.partition.add_(factor_M, self._start_weights)
        parameters = self.partition.parameters
        inner_M = self.partition.sum_named(
            lambda name: parameters[name] * self._start_weights[name]
        )
        # For an empty group the first condition is 0 >= 0; the second one keeps it empty.
        kept_M = (inner_M >= self._epsilon * square_M) & (square_M > 0)
        self.partition.scale_(kept_M.double())


class HspgSolver(HalfSpaceSolver):
    """HSPG: Prox-SG on group lasso for the first part of the training, then half-space steps."""

    def proximal_step(self, optimizer: ProximalOptimizer) -> None:
        """Apply the soft threshold of group lasso."""
        soft_threshold_(self.partition, self.lam)

    def gradient_factor(self, norm_M: Tensor, optimizer: ProximalOptimizer) -> Tensor:
        """Return sqrt|s_j| / ||x_j||."""
        weight_M = lasso_weights(self.partition)
        return torch.where(norm_M > 0, weight_M / norm_M, 0.0)


class ReleasedHspgSolver(Solver):
    """HSPG as in its authors' code (forsubmissionanonymity/nips_2021_2271, hspg.py).

    It differs from `HspgSolver` in three ways: there is no proximal step; the gradient of
    lambda sum_j ||v_j|| is added to that of the loss before momentum; and all groups have the same
    weight. In the half-space phase, y = x - alpha (momentum buffer) is tested against x.

    `cap` limits the fraction of a family's groups that is zero. A family that has reached it is no
    longer tested. If a test would exceed it, only int(M (fraction - cap)) of the groups that fail
    it, drawn at random, are zeroed; that count is the code's own. The released settings for
    convolutional networks have a cap of 1, which has no effect.

    In the released code a group is a filter with its bias, without BatchNorm. Here it includes
    BatchNorm, without which a zero group could not be removed.
    """

    _OFFSET = 1e-6

    def __init__(
        self,
        context: SolverContext,
        strength: float,
        epsilon: float = 0.0,
        warmup: float = 0.25,
        cap: float = 1.0,
    ) -> None:
        super().__init__(context, strength)
        self._weight, self._epsilon, self._warmup, self._cap = strength, epsilon, warmup, cap
        self._start_weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def before_step(self, optimizer: ProximalOptimizer) -> None:
        """Add lambda v / ||v|| to the gradient; before a half-space step, store the weights."""
        half_space = self.progress >= self._warmup
        norm_M = self.partition.norms()
        # The released code uses the exact subgradient (0 at 0) in the first phase, and adds 1e-6 to
        # the norm in the half-space phase.
        divisor_M = norm_M + self._OFFSET if half_space else norm_M
        factor_M = torch.where(norm_M > 0, self._weight / divisor_M, 0.0)
        self.partition.add_to_gradients_(factor_M)
        if half_space:
            self._start_weights = self.partition.copy_weights()

    def shrink(self, optimizer: ProximalOptimizer) -> None:
        """Zero the groups that left their half-space, and those that were zero before."""
        start, self._start_weights = self._start_weights, {}
        if not start:
            return
        parameters = self.partition.parameters
        square_M = self.partition.sum_named(lambda name: start[name].square())
        inner_M = self.partition.sum_named(lambda name: parameters[name] * start[name])
        empty_M = square_M == 0
        left_M = (inner_M < self._epsilon * square_M) & ~empty_M
        zeroed_M = empty_M | self._capped(left_M, empty_M)
        self.partition.scale_((~zeroed_M).double())

    def _capped(self, left_M: Tensor, empty_M: Tensor) -> Tensor:
        """Return a mask of the groups to zero among those that left their half-space."""
        # Seeded by the step, so that a resumed training draws the same groups.
        generator = torch.Generator().manual_seed(self.step)
        parts = []
        for left, empty in zip(
            self.partition.split(left_M), self.partition.split(empty_M), strict=True
        ):
            groups, chosen = len(left), left
            share = int((left | empty).sum()) / groups
            if int(empty.sum()) / groups >= self._cap:
                chosen = torch.zeros_like(left)
            elif share > self._cap:
                candidates = left.nonzero()[:, 0]
                count = int(groups * (share - self._cap))
                order = torch.randperm(len(candidates), generator=generator)[:count]
                chosen = torch.zeros_like(left)
                chosen[candidates[order.to(candidates.device)]] = True
            parts.append(chosen)
        return torch.cat(parts)


class AdaHspgSolver(HspgSolver):
    """HSPG that chooses between its two kinds of step after each epoch.

    Of AdaHSPG+ only the settings in its rebuttal are known: both kinds of step have equal
    preference (mu = 1), a phase lasts one epoch, and for networks the half-space step has no
    variance reduction. The choice here compares the two optimality measures of that family of
    methods: how far a proximal step moves groups into or out of zero, and how far a gradient step
    moves all other groups. Prox-SG replaces the paper's variance-reduced proximal step, and epsilon
    is fixed.
    """

    def __init__(self, context: SolverContext, strength: float, mu: float = 1.0) -> None:
        super().__init__(context, strength)
        self._mu = mu
        self._half_space = False
        self._moves = torch.zeros(2, dtype=torch.float64)

    def in_half_space_phase(self) -> bool:
        """Return the choice made after the last epoch."""
        return self._half_space

    def before_step(self, optimizer: ProximalOptimizer) -> None:
        """Add to the two measures; at the end of an epoch choose the kind of the next steps."""
        self._moves += self._measure(optimizer)
        if (self.step + 1) % self.context.epoch == 0:
            self._half_space = bool(self._moves[1] >= self._mu * self._moves[0])
            self._moves.zero_()
        super().before_step(optimizer)

    def state(self) -> dict[str, Tensor]:
        """Return the measures and the choice in addition to the base state."""
        chosen = torch.tensor(self._half_space)
        return {**super().state(), "moves": self._moves, "half_space": chosen}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the state of an interrupted training."""
        super().load(state)
        self._moves = state["moves"].clone()
        self._half_space = bool(state["half_space"])

    @torch.no_grad()
    def _measure(self, optimizer: ProximalOptimizer) -> Tensor:
        """Return how far a step moves the groups that are or become zero, and all others, [2]."""
        rate, norm_M = optimizer.rate, self.partition.norms()
        gradient_M = self.partition.sum(_squared_gradient)
        trial_M = self.partition.sum(lambda w: (w - rate * _gradient(w)).square()).sqrt()
        lam = self.step_strength(optimizer)
        shrunk_M = lasso_scale(trial_M, lam * lasso_weights(self.partition))
        border_M = (norm_M == 0) | (shrunk_M == 0)
        # A group that the proximal step zeroes moves by its norm, any other by a gradient step.
        moved_M = torch.where(shrunk_M == 0, norm_M, rate * gradient_M.sqrt())
        zero_M = torch.zeros_like(moved_M)
        parts = [torch.where(border_M, moved_M, zero_M), torch.where(border_M, zero_M, moved_M)]
        return torch.stack([part.norm() for part in parts]).cpu()


def _gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _squared_gradient(weight: Tensor) -> Tensor:
    return _gradient(weight).square()
