"""HESSO: groups of least saliency fade to zero, period by period (Chen et al., arXiv 2409.09085).

Shapes: M groups of all families.

At the start of each period, every group v_j with n_j weights gets a score. With G the direction of
the optimizer's step, which moves the weights by -rate G, it is

    s_j = Σ over x of 0.2 x_j / (‖x‖₂ + 1e-8),
    x one of ‖v_j‖, ‖v_j‖ / n_j, cos(v_j, G_j) + 1, |⟨v_j, G_j⟩|, ⟨v_j, G_j⟩² / 2

The groups of lowest score are chosen. Step t = 0, 1, ... of the D steps of a period multiplies them
by (D - t - 1) / (D - t), so that without training they would fall to zero linearly. Groups of
earlier periods are zeroed after each step. There is no regulariser.

The source is `hesso.py` of microsoft/only_train_once at 4517648, with two differences. Its groups
come from a graph that recent versions of torch cannot build; here groups, budget and floors are
those of all solvers. It also lets later periods choose zero groups again and cuts the surplus by
index, which favours early layers; here zero groups are excluded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.solvers.optimizers import ProximalOptimizer
from methods.wgsef.solvers.solver import Solver, SolverContext

_TINY = 1e-8


def saliency(partition: GroupPartition, direction: dict[str, Tensor]) -> Tensor:
    """Return HESSO's score of each group, [M]; `direction` holds G by parameter name."""
    norm_M = partition.norms()
    weights = partition.owned_parameters()
    product_M = partition.sum_named(lambda name: weights[name] * direction[name])
    direction_M = partition.sum_named(lambda name: direction[name].square()).sqrt()
    parts = [
        norm_M,
        norm_M / partition.elements_M,
        product_M / (norm_M * direction_M + _TINY) + 1,
        product_M.abs(),
        product_M.square() / 2,
    ]
    return normalised_mean(parts)


def normalised_mean(parts: Sequence[Tensor]) -> Tensor:
    """Return the mean over several scores [M], each divided by its norm over all groups."""
    return torch.stack([part_M / (part_M.norm() + _TINY) for part_M in parts]).mean(0)


class HessoSolver(Solver):
    """Fades groups out in `periods` equal parts; see `Hesso` for `start` and `span`."""

    def __init__(self, context: SolverContext, start: float, span: float, periods: int) -> None:
        super().__init__(context)
        self._first = int(start * context.steps)
        steps = max(1, int(span * context.steps))
        # A short training has fewer steps than periods.
        self._periods = min(periods, steps)
        self._length = steps // self._periods
        self.gone_M = torch.zeros_like(self.unit_M, dtype=torch.bool)
        self.fading_M = torch.zeros_like(self.gone_M)
        self._start_weights: dict[str, Tensor] = {}

    def _period_of(self, step: int) -> tuple[int, int]:
        """Return the period of a step, negative before the first, and its number within it."""
        period, number = divmod(step - self._first, self._length)
        return (period, number) if period < self._periods else (self._periods, 0)

    @torch.no_grad()
    def before_step(self, optimizer: ProximalOptimizer) -> None:
        """At the start of a period, store the weights, which give the direction of the step."""
        period, number = self._period_of(self.step)
        if 0 <= period < self._periods and number == 0:
            self._start_weights = self.partition.copy_weights()

    def shrink(self, optimizer: ProximalOptimizer) -> None:
        """Choose groups at the start of a period, and fade the chosen ones."""
        # The base class has already counted the step.
        period, number = self._period_of(self.step - 1)
        if period < 0:
            return
        if self._start_weights:
            self._choose(period, optimizer.rate)
        # After the last period no group is fading.
        left = self._length - number
        self.partition.scale_(self._with_fading((left - 1) / left))
        self.gate_M = self._with_fading((left - 1) / self._length)
        if left == 1:
            self.gone_M |= self.fading_M
            self.fading_M = torch.zeros_like(self.fading_M)

    def _with_fading(self, factor: float) -> Tensor:
        """Return factors [M]: `factor` for groups that are fading, 0 for faded ones, else 1."""
        factor_M = torch.where(self.fading_M, factor, 1.0).double()
        return factor_M.masked_fill(self.gone_M, 0)

    def _choose(self, period: int, rate: float) -> None:
        """Choose the groups that fade in a period, scored at the weights before its first step."""
        after = self.partition.copy_weights()
        direction = {
            name: (before - after[name]) / (rate if rate else 1.0)
            for name, before in self._start_weights.items()
        }
        # The score is a function of the partition's weights, so these are set back for it.
        self._load_weights(self._start_weights)
        score_M = saliency(self.partition, direction).masked_fill(self.gone_M, -1.0)
        self._load_weights(after)
        self._start_weights = {}
        # Budgets follow a cubic schedule, which is inverted here to get equal parts.
        due = (period + 1) / self._periods
        keep_M = self.context.allocation.select(score_M, 1 - (1 - due) ** (1 / 3))
        self.fading_M = ~keep_M & ~self.gone_M

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        for name, weight in self.partition.owned_parameters().items():
            weight.copy_(weights[name])

    def state(self) -> dict[str, Tensor]:
        """Return the base state and the masks of faded and fading groups."""
        return {**super().state(), "gone_M": self.gone_M, "fading_M": self.fading_M}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the state of an interrupted training."""
        super().load(state)
        self.gone_M = state["gone_M"].to(self.unit_M.device)
        self.fading_M = state["fading_M"].to(self.unit_M.device)
