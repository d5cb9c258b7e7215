"""Half-space steps: HSPG (Chen et al., 2020) and AdaHSPG+ (Dai et al., TMLR 2023).

Shapes: M groups of all families.

From x the step goes to y = x - alpha (gradient of loss and regulariser at x). Each group whose y
has left the half-space { y : <y, x> >= eps ||x||^2 } is set to zero; zero groups stay zero (WGSEF
specification section 4).
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from methods.wgsef.solvers.group_lasso import lasso_scale, lasso_weights
from methods.wgsef.solvers.solver import Scene, Solver
from methods.wgsef.training.optimizers import Stepping


class HalfSpace(Solver):
    """A proximal phase, then half-space steps, for a regulariser given by a subclass."""

    def __init__(
        self, scene: Scene, strength: float, epsilon: float = 0.0, warmup: float = 0.25
    ) -> None:
        super().__init__(scene)
        self.strength = strength
        self._epsilon, self._warmup = epsilon, warmup
        self._before: dict[str, Tensor] = {}

    @abstractmethod
    def proximal_step(self, optimizer: Stepping) -> None:
        """Apply the proximal operator of the regulariser to the weights."""

    @abstractmethod
    def pull(self, norm_M: Tensor) -> Tensor:
        """Return the factor [M] of x in the regulariser's gradient; finite for empty groups."""

    def in_half_space_phase(self) -> bool:
        """Return whether the next step is a half-space step."""
        return self.progress >= self._warmup

    def before(self, optimizer: Stepping) -> None:
        """Store the weights from which a half-space step starts."""
        if self.in_half_space_phase():
            weights = self.partition.owned_parameters()
            self._before = {name: weight.detach().clone() for name, weight in weights.items()}

    def shrink(self, optimizer: Stepping) -> None:
        """Apply the proximal operator, or complete the half-space step that the optimizer began."""
        # The phase is decided once, in `before`: `progress` has moved on since, and a step that
        # began as a proximal one has no stored weights.
        if self._before:
            self._half_space_step(optimizer)
            self._before = {}
        else:
            self.proximal_step(optimizer)

    def _half_space_step(self, optimizer: Stepping) -> None:
        square_M = self.partition.sum_named(lambda name: self._before[name].square())
        # The optimizer's step already contains the gradient of the loss. The regulariser's is added
        # at x and outside the optimizer, so that momentum and Adam's metric do not distort it.
        factor_M = -optimizer.rate * self.strength * self.pull(square_M.sqrt())
        self.partition.add_(factor_M, self._before)
        parameters = self.partition.parameters
        inner_M = self.partition.sum_named(lambda name: parameters[name] * self._before[name])
        # An empty group has 0 >= 0, so the second condition is needed to keep it empty.
        stays_M = (inner_M >= self._epsilon * square_M) & (square_M > 0)
        self.partition.scale_(stays_M.double())


class Hspg(HalfSpace):
    """HSPG: Prox-SG on group lasso for the first part of the training, then half-space steps."""

    def proximal_step(self, optimizer: Stepping) -> None:
        """Apply the soft threshold of group lasso."""
        norm_M, weight_M = self.partition.norms(), lasso_weights(self.partition)
        lam = optimizer.rate * self.strength
        self.partition.scale_(lasso_scale(norm_M, lam * weight_M))

    def pull(self, norm_M: Tensor) -> Tensor:
        """Return sqrt|s_j| / ||x_j||."""
        weight_M = lasso_weights(self.partition)
        return torch.where(norm_M > 0, weight_M / norm_M, 0.0)


class AdaHspg(Hspg):
    """HSPG that chooses between its two steps after each epoch.

    Of AdaHSPG+ only the settings in its rebuttal could be read: both steps have equal preference
    (mu = 1), phases last an epoch, and on networks the half-space step has no variance reduction.
    The choice here follows the two optimality measures of that family of methods: how far a
    proximal step moves groups into or out of zero, against how far a gradient step moves all
    others. The paper's variance-reduced proximal step is replaced by Prox-SG, and epsilon is fixed.
    """

    def __init__(self, scene: Scene, strength: float, mu: float = 1.0) -> None:
        super().__init__(scene, strength)
        self._mu = mu
        self._half_space = False
        self._moves = torch.zeros(2, dtype=torch.float64)

    def in_half_space_phase(self) -> bool:
        """Return the choice made after the last epoch."""
        return self._half_space

    def before(self, optimizer: Stepping) -> None:
        """Add this step to the two measures; at the end of an epoch choose the next step."""
        self._moves += self._measure(optimizer)
        if (self.step + 1) % self.scene.epoch == 0:
            self._half_space = bool(self._moves[1] >= self._mu * self._moves[0])
            self._moves.zero_()
        super().before(optimizer)

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
    def _measure(self, optimizer: Stepping) -> Tensor:
        """Return how far a step moves groups at the border of zero, and how far all others."""
        rate, norm_M = optimizer.rate, self.partition.norms()
        gradient_M = self.partition.sum(_squared_gradient)
        trial_M = self.partition.sum(lambda w: (w - rate * _gradient(w)).square()).sqrt()
        shrunk_M = lasso_scale(trial_M, rate * self.strength * lasso_weights(self.partition))
        border_M = (norm_M == 0) | (shrunk_M == 0)
        # A group that the proximal step zeroes moves by its whole norm; any other by a gradient
        # step.
        moved_M = torch.where(shrunk_M == 0, norm_M, rate * gradient_M.sqrt())
        zero_M = torch.zeros_like(moved_M)
        parts = [torch.where(border_M, moved_M, zero_M), torch.where(border_M, zero_M, moved_M)]
        return torch.stack([part.norm() for part in parts]).cpu()


def _gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _squared_gradient(weight: Tensor) -> Tensor:
    return _gradient(weight).square()
