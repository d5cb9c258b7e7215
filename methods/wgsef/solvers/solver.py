"""What all solvers have in common, and the two that do nothing while training.

Shapes: M groups of all families.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.wgsef.groups.partition import Partition
from methods.wgsef.training.allocation import Allocation
from methods.wgsef.training.optimizers import Stepping

_NOT_WHOLE = 1 - 1e-9


@dataclass(frozen=True)
class Scene:
    """What a solver is given: the network, its groups, the budget and the length of the run.

    `steps` counts the steps until the mask is frozen, `epoch` those of one epoch; `example` is one
    input of the network.
    """

    network: nn.Module
    partition: Partition
    allocation: Allocation
    steps: int
    epoch: int
    example: Tensor


class Solver:
    """Acts before and after each optimizer step; the base class leaves everything as it is.

    `ridge` says that the solver decays the groups' weights itself, so that the optimizer must not.
    """

    ridge = False

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.partition = scene.partition
        self.step = 0
        self.unit_M = layer_units(scene.partition)
        self.gate_M = torch.ones_like(self.unit_M)

    @property
    def progress(self) -> float:
        """How much of the time until the mask is frozen has passed, 0 to 1."""
        return min(1.0, self.step / self.scene.steps)

    @property
    def fractional(self) -> int:
        """How many groups the last operator left neither whole nor zero."""
        between_M = (self.gate_M > 0) & (self.gate_M < _NOT_WHOLE)
        # A half-space step may have zeroed a group since.
        return int((between_M & self.partition.alive()).sum())

    def before(self, optimizer: Stepping) -> None:
        """Act on gradients, before the optimizer's step."""

    def after(self, optimizer: Stepping) -> None:
        """Act on weights, after the optimizer's step."""
        self.step += 1
        with torch.no_grad():
            self.shrink(optimizer)

    def shrink(self, optimizer: Stepping) -> None:
        """Change the groups' weights; the part of `after` that solvers differ in."""

    def score(self) -> Tensor:
        """Return what the final selection ranks groups by, [M].

        Norms are relative to the mean of their layer when training began, so that layers of other
        sizes and other initial scales compete fairly.
        """
        return self.unit_M * self.partition.norms()

    def state(self) -> dict[str, Tensor]:
        """Return all that the next steps depend on."""
        step = torch.tensor(self.step)
        return {"step": step, "unit_M": self.unit_M, "gate_M": self.gate_M}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` of an interrupted run returned."""
        self.step = int(state["step"])
        self.unit_M = state["unit_M"].to(self.unit_M.device)
        self.gate_M = state["gate_M"].to(self.unit_M.device)


class Frozen(Solver):
    """Holds the groups that are gone at zero: the fine-tuning after the selection."""

    def __init__(self, scene: Scene, keep_M: Tensor) -> None:
        super().__init__(scene)
        self.keep_M = keep_M

    def shrink(self, optimizer: Stepping) -> None:
        """Zero what momentum or decay has moved."""
        self.partition.scale_(self.keep_M.double())


class Magnitude(Solver):
    """Trains densely; the selection at the end takes the groups of largest norm.

    This is the limit lam -> 1 of the debiased operator (WGSEF specification section 4).
    """


def layer_units(partition: Partition) -> Tensor:
    """Return, for each group, one over the mean norm of its family, [M]; 1 where that is 0."""
    means = [norms.mean().expand(len(norms)) for norms in partition.split(partition.norms())]
    mean_M = torch.cat(means)
    return torch.where(mean_M > 0, 1 / mean_M, torch.ones_like(mean_M))
