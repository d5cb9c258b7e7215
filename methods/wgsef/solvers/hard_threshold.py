"""Iterative hard thresholding: after each step only the top groups are kept, fewer and fewer."""

from __future__ import annotations

from methods.wgsef.solvers.solver import Solver
from methods.wgsef.training.optimizers import Stepping


class HardThreshold(Solver):
    """Gradient step, then projection onto k groups; k follows the cubic schedule.

    Dropped groups may come back, since their gradients are still applied.
    """

    def shrink(self, optimizer: Stepping) -> None:
        """Zero all groups except those of highest score that the budget of this step allows."""
        keep_M = self.scene.allocation.select(self.score(), self.progress)
        self.partition.scale_(keep_M.double())
