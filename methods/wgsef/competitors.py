"""WGSEF's competitors and controls, each a solver in the same sparse training."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from methods.wgsef.groups.choice import outlines
from methods.wgsef.solvers import group_lasso, penalties
from methods.wgsef.solvers.hesso import HessoSolver
from methods.wgsef.solvers.solver import HardThresholdSolver, MagnitudeSolver, Solver, SolverContext
from methods.wgsef.sparse_training import SparseTraining

if TYPE_CHECKING:
    from bench.models.structure.model_structure import ModelStructure


class GroupLasso(SparseTraining):
    """Group lasso by Prox-SG; with `adaptive`, in the metric of the optimizer (ProxSSI)."""

    strength: float = Field(default=1e-2, gt=0)
    adaptive: bool = False

    def solver(self, context: SolverContext) -> Solver:
        """Return ProxSSI's solver if `adaptive`, else that of Prox-SG."""
        maker = (
            group_lasso.AdaptiveGroupLassoSolver if self.adaptive else group_lasso.GroupLassoSolver
        )
        return maker(context, self.strength)


Variant = Literal["ours", "released"]
"""`ours` implements a competitor like all other solvers; `released` follows its authors' code."""


class Hspg(SparseTraining):
    """HSPG: Prox-SG on group lasso, then half-space steps after the fraction `warmup`.

    With `variant=released` the first part is a subgradient method. `cap` then is the fraction of a
    layer's groups that may become zero; half-space tests stop there.
    """

    variant: Variant = "ours"
    strength: float = Field(default=1e-2, gt=0)
    epsilon: float = Field(default=0.0, ge=0, lt=1)
    warmup: float = Field(default=0.25, ge=0, le=1)
    cap: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _refuse_cap(self) -> Self:
        if self.variant == "ours" and self.cap < 1:
            raise ValueError(
                f"cap={self.cap:g} needs variant=released: set variant=released or cap=1"
            )
        return self

    def solver(self, context: SolverContext) -> Solver:
        """Return the variant's solver; only the released one stops at `cap`."""
        if self.variant == "released":
            return group_lasso.ReleasedHspgSolver(
                context, self.strength, self.epsilon, self.warmup, self.cap
            )
        return group_lasso.HspgSolver(context, self.strength, self.epsilon, self.warmup)


class AdaHspg(SparseTraining):
    """AdaHSPG+ without variance reduction: chooses one of the two kinds of step every epoch."""

    strength: float = Field(default=3e-2, gt=0)
    mu: float = Field(default=1.0, gt=0)

    def solver(self, context: SolverContext) -> Solver:
        """Return the solver."""
        return group_lasso.AdaHspgSolver(context, self.strength, self.mu)


class DeepHoyer(SparseTraining):
    """The group Hoyer-square penalty."""

    variant: Variant = "ours"
    strength: float = Field(default=1e-1, gt=0)

    def solver(self, context: SolverContext) -> Solver:
        """Return the variant's solver; the released one also penalises the last layer."""
        released = self.variant == "released"
        maker = penalties.ReleasedDeepHoyerSolver if released else penalties.DeepHoyerSolver
        return maker(context, self.strength)


class Slimming(SparseTraining):
    """Network slimming: L1 on BatchNorm scales."""

    strength: float = Field(default=3e-2, gt=0)

    def check(self, structure: ModelStructure) -> None:
        """Also refuse groups without a scale of BatchNorm."""
        super().check(structure)
        for family in outlines(self._require_classifier(structure), self._choice()):
            if not family.normalised:
                raise penalties.no_scale_error(family.name)

    def solver(self, context: SolverContext) -> Solver:
        """Return the solver."""
        return penalties.SlimmingSolver(context, self.strength)


class MagnitudePruning(SparseTraining):
    """Dense training, then selection of the groups of largest norm."""

    def solver(self, context: SolverContext) -> Solver:
        """Return the solver."""
        return MagnitudeSolver(context)


class IterativeHardThresholding(SparseTraining):
    """Projection onto fewer and fewer groups after each step."""

    def solver(self, context: SolverContext) -> Solver:
        """Return the solver."""
        return HardThresholdSolver(context)


class GroupNorm(SparseTraining):
    """torch-pruning's sparse training with group norms (DepGraph)."""

    coupled_filters: ClassVar[bool] = True

    variant: Variant = "ours"
    strength: float = Field(default=1e-3, gt=0)

    def solver(self, context: SolverContext) -> Solver:
        """Return a solver that ranks by norms over their mean, or their maximum as released."""
        normalizer = "max" if self.variant == "released" else "mean"
        return penalties.GroupNormSolver(context, self.strength, normalizer)


class Hesso(SparseTraining):
    """HESSO: in each period, the groups of least saliency are chosen and fade linearly to zero.

    `start` and `span` are fractions of the steps before the selection: training is plain until
    `start`, and the `periods` take the fraction `span` after it.
    """

    start: float = Field(default=0.15, ge=0, lt=1)
    span: float = Field(default=0.2, gt=0, le=1)
    periods: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _refuse_long_span(self) -> Self:
        if self.start + self.span > 1:
            raise ValueError(
                f"start={self.start:g} and span={self.span:g} end after the selection: lower one "
                "of them so that their sum is at most 1"
            )
        return self

    def solver(self, context: SolverContext) -> Solver:
        """Return the solver."""
        return HessoSolver(context, self.start, self.span, self.periods)


class GrowingReg(SparseTraining):
    """torch-pruning's growing regularisation."""

    coupled_filters: ClassVar[bool] = True

    strength: float = Field(default=1e-4, gt=0)
    growth: float = Field(default=1e-3, gt=0)

    def solver(self, context: SolverContext) -> Solver:
        """Return the solver."""
        return penalties.GrowingRegSolver(context, self.strength, self.growth)
