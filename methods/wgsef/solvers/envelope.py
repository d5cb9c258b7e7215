"""WGSEF's solvers: the proximal operator of the envelope, with half-space steps, and debiased.

Shapes: M groups of all families.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from methods.wgsef.prox import operators
from methods.wgsef.solvers.allocation import ProxParameters
from methods.wgsef.solvers.group_lasso import HalfSpaceSolver
from methods.wgsef.solvers.optimizers import ProximalOptimizer
from methods.wgsef.solvers.schedules import homotopy_ratio
from methods.wgsef.solvers.solver import Solver, SolverContext

AUTO_TOTAL = 19.0
"""Sum of lambda over a training with `strength=auto`.

Without a gradient of the loss, groups k and k + 1 are separated if their norms differ by the factor
1 + 1 / (exp(total) - 1): a total of 7 suffices for a relative gap of 1e-3. The gradient of the loss
counteracts the operator; 19 sufficed on the networks that ship with the suite (docs/wgsef.md).
"""

EnvelopeMetric = Literal["unit", "euclidean"]


@dataclass(frozen=True)
class EnvelopeForm:
    """Variant of the envelope: its strength, its metric, and whether it has the ridge term.

    `strength` is the paper's lambda, which each step multiplies by the learning rate. The number of
    groups left depends only on the sum of these products. `auto` makes them independent of the
    learning rate, which is lowest when the operator is needed most: they rise in proportion to
    progress, to a total of `AUTO_TOTAL`.

    `metric=euclidean` is that of the paper. `unit` measures steps in units of the mean norm of each
    layer (h_j = d_j), so that all layers shrink at the same relative rate.

    `ridge=true` is the whole envelope F, which also shrinks the groups with u_j = 1, by
    1 / (1 + lam d_j / h_j). `false` penalises F - 1/2 sum d_j ||v_j||^2 instead, which is 0 as soon
    as at most k groups are left. Its second term is concave and linearised at t, as in proximal
    steps on a difference of convex functions: v = prox_{lam F}((1 + lam d_j / h_j) t_j), which
    leaves whole groups unchanged.

    `every` applies the operator only every n-th step, n times as strongly.
    """

    strength: float | Literal["auto"] = "auto"
    metric: EnvelopeMetric = "unit"
    ridge: bool = False
    every: int = 1

    def lam(self, solver: Solver, optimizer: ProximalOptimizer) -> float:
        """Return lambda of this step: strength times step size, in the units of the metric."""
        if solver.step % self.every:
            return 0.0
        if self.strength == "auto":
            return self.every * 2 * AUTO_TOTAL * solver.progress / solver.context.steps
        lam = self.every * self.strength * optimizer.rate
        # A step of Adam is rate / h times the gradient. The unit metric is relative within a layer
        # and loses the overall size of h, so lambda is divided by its mean here.
        adam_M = group_metric(solver, optimizer) if self.metric == "unit" else None
        return lam if adam_M is None else lam / float(adam_M.mean())

    def prox_parameters(
        self, solver: Solver, optimizer: ProximalOptimizer, lam: float
    ) -> ProxParameters:
        """Return lambda, the weights d_j = 1 / (mean norm of the layer)^2 and the metric h_j."""
        weight_M = solver.unit_M.square()
        adam_M = group_metric(solver, optimizer)
        if self.metric == "euclidean":
            return ProxParameters(lam, weight_M, adam_M)
        if adam_M is None:
            return ProxParameters(lam, weight_M, weight_M)
        # Only the variation of Adam's metric within a layer is used. Its level is low in layers
        # with small gradients, and would remove their groups first.
        means = [part.mean().expand(len(part)) for part in solver.partition.split(adam_M)]
        return ProxParameters(lam, weight_M, weight_M * adam_M / torch.cat(means))


class EnvelopeSolver(Solver):
    """Algorithm 2 of arXiv 2212.12921: Prox-SGD with the WGSEF, with the final k from the start.

    The weights d_j = 1 / (mean norm of the layer)^2 make layers comparable under one k for the
    whole network. How close the number of groups gets to k depends on the sum of lambda over all
    steps.
    """

    def __init__(self, context: SolverContext, form: EnvelopeForm = EnvelopeForm()) -> None:
        super().__init__(context)
        self._form = form
        self.decays_groups = form.ridge

    def step_strength(self, optimizer: ProximalOptimizer) -> float:
        """Return lambda of this step."""
        return self._form.lam(self, optimizer)

    def shrink(self, optimizer: ProximalOptimizer) -> None:
        """Apply the operator."""
        # The operator needs lam > 0; the rate is 0 at the end of the cosine schedule.
        if self.lam > 0:
            apply_envelope(self, self._form, optimizer)


def apply_envelope(solver: Solver, form: EnvelopeForm, optimizer: ProximalOptimizer) -> None:
    """Shrink the solver's groups by the envelope's proximal operator, and store its gates."""
    strength = form.prox_parameters(solver, optimizer, solver.lam)
    lift_M = 1.0 if form.ridge else 1 + strength.ridge
    # Progress 1: as in the paper, the budget is the final k in every step.
    scale_M, solver.gate_M = solver.context.allocation.shrink(
        operators.prox_envelope, lift_M * solver.partition.norms(), strength, 1.0
    )
    if not form.ridge:
        # Whole groups, including those that a floor protects, stay exactly as they were.
        scale_M = (scale_M * lift_M).masked_fill(solver.whole, 1.0)
    solver.partition.scale_(scale_M)


class EnvelopeHalfSpaceSolver(HalfSpaceSolver):
    """Algorithm 2 first, then half-space steps on the same objective: "WGSEF + HSPG".

    According to the paper's reviewers, its experiments used this combination. No details are
    published, so it is implemented as HSPG (see `group_lasso`) with the envelope instead of group
    lasso.
    """

    def __init__(
        self,
        context: SolverContext,
        form: EnvelopeForm = EnvelopeForm(),
        epsilon: float = 0.0,
        warmup: float = 0.5,
    ) -> None:
        super().__init__(context, None, epsilon, warmup)
        self._form = form
        self.decays_groups = form.ridge

    def step_strength(self, optimizer: ProximalOptimizer) -> float:
        """Return lambda of this step."""
        return self._form.lam(self, optimizer)

    def proximal_step(self, optimizer: ProximalOptimizer) -> None:
        """Apply the proximal operator of the envelope."""
        if self.lam > 0:
            apply_envelope(self, self._form, optimizer)

    def gradient_factor(self, norm_M: Tensor, optimizer: ProximalOptimizer) -> Tensor:
        """Return the factor of x: d_j / (h_j u_j) with ridge, (1 / u_j - 1) d_j / h_j without."""
        allocation = self.context.allocation
        strength = self._form.prox_parameters(self, optimizer, self.lam)
        assert strength.weight is not None
        norm_LN = allocation.constraint_rows(norm_M)
        weight_LN = allocation.constraint_rows(strength.weight)
        factor_M = allocation.from_constraint_rows(
            operators.gradient_factor(norm_LN, weight_LN, allocation.k_rows(1.0))
        )
        if not self._form.ridge:
            factor_M = (factor_M - strength.weight).clamp(min=0)
        return factor_M if strength.metric is None else factor_M / strength.metric


class DebiasedSolver(Solver):
    """Homotopy of the debiased operator: ends with at most k groups, by construction.

    The ratio lam d rises from 0 to `reach` while k falls from all groups to the target, so that
    groups fade out gradually; kept groups are never shrunk (specification 1.2). The operator acts
    in the metric in which each layer has mean norm 1, so at ratio 1 it keeps the top k of `score`.
    """

    def __init__(self, context: SolverContext, reach: float = 1.0) -> None:
        super().__init__(context)
        self._reach = reach

    def shrink(self, optimizer: ProximalOptimizer) -> None:
        """Apply the operator at the current ratio; at ratio 1, select the top k."""
        ratio = self._reach * homotopy_ratio(self.progress)
        allocation, score_M = self.context.allocation, self.score()
        # The operator divides by 1 - ratio; its limit is hard selection.
        if ratio >= 1:
            scale_M = self.gate_M = allocation.select(score_M).double()
        else:
            # With scores instead of norms, the operator acts in the normalised metric, in which all
            # layers have the same ratio. The factors do not depend on the unit.
            scale_M, self.gate_M = allocation.shrink(
                operators.prox_debiased, score_M, ProxParameters(ratio), self.progress
            )
        self.partition.scale_(scale_M)


def group_metric(solver: Solver, optimizer: ProximalOptimizer) -> Tensor | None:
    """Return the mean of the optimizer's metric over each group, [M]; None for a Euclidean step."""
    # For a metric that varies within a group, the operator has no closed form and takes tens of
    # passes (specification 1.3). With the mean over the group it takes one.
    if not optimizer.adaptive:
        return None
    return solver.partition.sum(optimizer.metric) / solver.partition.elements_M
