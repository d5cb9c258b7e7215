"""Base class of all solvers, and the simple ones: none, frozen, magnitude, hard thresholding.

Shapes: M groups of all families.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.solvers.allocation import Allocation
from methods.wgsef.solvers.optimizers import ProximalOptimizer

_WHOLE_GATE = 1 - 1e-9


@dataclass(frozen=True)
class SolverContext:
    """Inputs of a solver: the network, its groups, the budget and the length of the training.

    `steps` is the number of steps before the mask is frozen, `epoch` the number of steps per epoch,
    and `example` one input of the network.
    """

    network: nn.Module
    partition: GroupPartition
    allocation: Allocation
    steps: int
    epoch: int
    example: Tensor


class Solver:
    """Acts before and after each optimizer step; the base class changes nothing.

    `strength` is that of the solver's regulariser, or None if it has none. `lam` is strength times
    step size in the last step; `total_strength` is its sum over all steps, which determines how
    many groups are left. If `decays_groups` is set, the solver decays the weights of groups itself
    and the optimizer must not.
    """

    decays_groups = False

    def __init__(self, context: SolverContext, strength: float | None = None) -> None:
        self.context = context
        self.partition = context.partition
        self.strength = strength
        self.step = 0
        self.lam = self.total_strength = 0.0
        # Norms are divided by the mean of their layer at the start. The current mean would hide
        # that a layer shrinks as a whole.
        self.unit_M = layer_units(context.partition)
        self.gate_M = torch.ones_like(self.unit_M)

    @property
    def progress(self) -> float:
        """Fraction of the steps before the mask is frozen that have been taken, 0 to 1."""
        return min(1.0, self.step / self.context.steps)

    @property
    def fractional(self) -> int:
        """Number of groups that the last operator left neither whole nor zero."""
        between_M = (self.gate_M > 0) & ~self.whole
        # A half-space step may have zeroed groups since the last proximal step.
        return int((between_M & self.partition.alive()).sum())

    @property
    def whole(self) -> Tensor:
        """Mask [M] of the groups that the last operator kept whole."""
        return self.gate_M >= _WHOLE_GATE

    def step_strength(self, optimizer: ProximalOptimizer) -> float:
        """Return strength times the size of this step."""
        return 0.0 if self.strength is None else self.strength * optimizer.rate

    def before_step(self, optimizer: ProximalOptimizer) -> None:
        """Change gradients, before the optimizer's step."""

    def after_step(self, optimizer: ProximalOptimizer) -> None:
        """Change weights, after the optimizer's step."""
        # Counted first, so that `progress` reaches 1 at the last step before the selection.
        self.step += 1
        self.lam = self.step_strength(optimizer)
        self.total_strength += self.lam
        with torch.no_grad():
            self.shrink(optimizer)

    def shrink(self, optimizer: ProximalOptimizer) -> None:
        """Change the weights of groups; the part of `after_step` that subclasses override."""

    def score(self) -> Tensor:
        """Return the score by which the final selection ranks groups, [M].

        It is the norm relative to the layer's mean norm at the start of training, so that layers of
        different sizes and initial scales compete fairly.
        """
        return self.unit_M * self.partition.norms()

    def state(self) -> dict[str, Tensor]:
        """Return everything that later steps depend on."""
        step = torch.tensor(self.step)
        total = torch.tensor(self.total_strength, dtype=torch.float64)
        return {"step": step, "total_strength": total, "unit_M": self.unit_M, "gate_M": self.gate_M}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` of an interrupted training returned."""
        self.step = int(state["step"])
        self.total_strength = float(state["total_strength"])
        self.unit_M = state["unit_M"].to(self.unit_M.device)
        self.gate_M = state["gate_M"].to(self.unit_M.device)


class FrozenSolver(Solver):
    """Holds removed groups at zero during the fine-tuning after the selection."""

    def __init__(self, context: SolverContext, keep_M: Tensor) -> None:
        super().__init__(context)
        self.keep_M = keep_M

    def shrink(self, optimizer: ProximalOptimizer) -> None:
        """Zero what momentum or weight decay has moved."""
        # Masking gradients would not suffice: momentum from before the selection moves weights too.
        self.partition.scale_(self.keep_M.double())


def select_alive(context: SolverContext, score_M: Tensor) -> tuple[Tensor, int]:
    """Make the final selection and zero all other groups.

    Return the mask [M] of the kept groups, and the number of groups that were not zero before.
    """
    alive_M = context.partition.alive()
    # The selection always fills the budget, if necessary with groups that are already zero.
    keep_M = context.allocation.select(score_M) & alive_M
    context.partition.scale_(keep_M.double())
    return keep_M, int(alive_M.sum())


class MagnitudeSolver(Solver):
    """Trains densely; the selection at the end keeps the groups of largest norm.

    This is the limit lam d -> 1 of the debiased operator (WGSEF specification section 4).
    """


def layer_units(partition: GroupPartition) -> Tensor:
    """Return the reciprocal of the mean norm of each group's family, [M]; 1 if that mean is 0."""
    means = [norms.mean().expand(len(norms)) for norms in partition.split(partition.norms())]
    mean_M = torch.cat(means)
    return torch.where(mean_M > 0, 1 / mean_M, torch.ones_like(mean_M))


class HardThresholdSolver(Solver):
    """Iterative hard thresholding: a gradient step, then projection onto the k strongest groups.

    k follows the cubic schedule. Dropped groups can return, since their gradients are still
    applied.
    """

    def shrink(self, optimizer: ProximalOptimizer) -> None:
        """Zero all groups except those of highest score that the budget of this step allows."""
        keep_M = self.context.allocation.select(self.score(), self.progress)
        self.partition.scale_(keep_M.double())
