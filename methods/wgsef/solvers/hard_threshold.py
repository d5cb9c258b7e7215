"""Iterative hard thresholding: after every step only the top groups stay, fewer and fewer."""

from __future__ import annotations

from methods.wgsef.solvers.solver import Solver
from methods.wgsef.training.optimizers import Stepping


class HardThreshold(Solver):
    """Gradient step, then projection onto k groups; k falls on the cubic schedule.

    Groups that were dropped may come back, for their gradients are still followed.
    """

    def shrink(self, optimizer: Stepping) -> None:
        """Zero all groups but those of the highest score that this point affords."""
        keep_M = self.scene.allocation.select(self.score(), self.progress)
        self.partition.scale_(keep_M.double())
