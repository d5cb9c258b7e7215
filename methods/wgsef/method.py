"""WGSEF and competing methods: one class per solver, all with the same training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from methods.wgsef.solvers import envelope, gradients, group_lasso, half_space, torch_pruning
from methods.wgsef.solvers.hard_threshold import HardThreshold
from methods.wgsef.solvers.solver import Magnitude, Scene, Solver
from methods.wgsef.sparse_training import SparseTraining


class Wgsef(SparseTraining):
    """WGSEF with one of three algorithms; `debiased` ends with at most k groups by design.

    `envelope` is the paper's Algorithm 2, `hspg` adds half-space steps, `debiased` is the homotopy.
    `strength` is the paper's lambda, which `debiased` does not use; `every` applies the operator
    every n steps with n times the strength. `reach` is where the homotopy of lambda d ends: 1 is
    the hard selection; a smaller value leaves more to the final selection.
    """

    algorithm: Literal["envelope", "hspg", "debiased"] = "debiased"
    strength: float = Field(default=0.3, gt=0)
    every: int = Field(default=1, ge=1)
    reach: float = Field(default=1.0, gt=0)

    @field_validator("reach")
    @classmethod
    def _below_one(cls, reach: float) -> float:
        if reach > 1:
            raise ValueError("must be at most 1, where the debiased operator is hard selection")
        return reach

    def solver(self, scene: Scene) -> Solver:
        """Return the solver of the chosen algorithm."""
        if self.algorithm == "envelope":
            return envelope.Envelope(scene, self.strength, self.every)
        if self.algorithm == "hspg":
            return envelope.EnvelopeHalfSpace(scene, self.strength)
        return envelope.Debiased(scene, self.reach)


class GroupLasso(SparseTraining):
    """Group lasso by Prox-SG; with `adaptive`, in the metric of the optimizer (ProxSSI)."""

    strength: float = Field(default=1e-2, gt=0)
    adaptive: bool = False

    def solver(self, scene: Scene) -> Solver:
        """Return the solver."""
        maker = group_lasso.AdaptiveGroupLasso if self.adaptive else group_lasso.GroupLasso
        return maker(scene, self.strength)


class Hspg(SparseTraining):
    """HSPG: Prox-SG on group lasso, then half-space steps after the fraction `warmup`."""

    strength: float = Field(default=1e-2, gt=0)
    epsilon: float = Field(default=0.0, ge=0, lt=1)
    warmup: float = Field(default=0.25, ge=0, le=1)

    def solver(self, scene: Scene) -> Solver:
        """Return the solver."""
        return half_space.Hspg(scene, self.strength, self.epsilon, self.warmup)


class AdaHspg(SparseTraining):
    """AdaHSPG+ without variance reduction: chooses between both kinds of step each epoch."""

    strength: float = Field(default=3e-2, gt=0)
    mu: float = Field(default=1.0, gt=0)

    def solver(self, scene: Scene) -> Solver:
        """Return the solver."""
        return half_space.AdaHspg(scene, self.strength, self.mu)


class DeepHoyer(SparseTraining):
    """The group Hoyer-square penalty."""

    strength: float = Field(default=1e-1, gt=0)

    def solver(self, scene: Scene) -> Solver:
        """Return the solver."""
        return gradients.DeepHoyer(scene, self.strength)


class Slimming(SparseTraining):
    """Network slimming: L1 on BatchNorm scales."""

    strength: float = Field(default=3e-2, gt=0)

    def solver(self, scene: Scene) -> Solver:
        """Return the solver."""
        return gradients.Slimming(scene, self.strength)


class MagnitudePruning(SparseTraining):
    """Dense training, then selection of the groups of largest norm."""

    def solver(self, scene: Scene) -> Solver:
        """Return the solver."""
        return Magnitude(scene)


class IterativeHardThresholding(SparseTraining):
    """Projection onto fewer and fewer groups after each step."""

    def solver(self, scene: Scene) -> Solver:
        """Return the solver."""
        return HardThreshold(scene)


class GroupNorm(SparseTraining):
    """torch-pruning's sparse training with group norms (DepGraph)."""

    strength: float = Field(default=1e-3, gt=0)

    def solver(self, scene: Scene) -> Solver:
        """Return the solver."""
        return torch_pruning.GroupNorm(scene, self.strength)


class GrowingReg(SparseTraining):
    """torch-pruning's growing regularisation."""

    strength: float = Field(default=1e-4, gt=0)
    growth: float = Field(default=1e-3, gt=0)

    def solver(self, scene: Scene) -> Solver:
        """Return the solver."""
        return torch_pruning.GrowingReg(scene, self.strength, self.growth)
