"""Solvers of the paper: the envelope's prox, the same with half-space steps, and the debiased one.

Shapes: M groups of all families.
"""

from __future__ import annotations

from torch import Tensor

from methods.wgsef.prox import operators, value
from methods.wgsef.solvers.allocation import ProxParameters
from methods.wgsef.solvers.group_lasso import HalfSpaceSolver
from methods.wgsef.solvers.optimizers import ProximalOptimizer
from methods.wgsef.solvers.schedules import homotopy_ratio
from methods.wgsef.solvers.solver import Solver, SolverContext


class EnvelopeSolver(Solver):
    """Algorithm 2 of arXiv 2212.12921: Prox-SGD with the WGSEF, at the final k from the start.

    The weights are d_j = 1 / (mean norm of the layer)^2, which makes layers comparable under one
    network-wide k; `strength` is the paper's lambda. After Adam the metric is the mean of Adam's
    over the group (specification 1.3). How close it gets to k depends on the dynamics
    (specification 1.1).
    """

    decays_groups = True

    def __init__(self, context: SolverContext, strength: float = 0.1, every: int = 1) -> None:
        super().__init__(context)
        self._strength, self._every = strength, every

    def shrink(self, optimizer: ProximalOptimizer) -> None:
        """Apply the operator every `every` steps, scaling its strength by `every`."""
        if self.step % self._every:
            return
        lam = optimizer.rate * self._strength * self._every
        # The operator needs lam > 0; the rate is 0 at the end of the cosine schedule.
        if lam == 0:
            return
        strength = ProxParameters(lam, self.unit_M.square(), group_metric(self, optimizer))
        allocation = self.context.allocation
        # Progress 1: the budget is the final k in each step, as in the paper; no schedule.
        scale_M, self.gate_M = allocation.shrink(
            operators.prox_envelope, self.partition.norms(), strength, 1.0
        )
        self.partition.scale_(scale_M)


class EnvelopeHalfSpaceSolver(HalfSpaceSolver):
    """Algorithm 2 first, then half-space steps on the same objective: "WGSEF + HSPG".

    According to the paper's reviewers its experiments report this pair. No details were found, so
    it is implemented as HSPG (see `group_lasso`) with the envelope in place of group lasso.
    """

    decays_groups = True

    def __init__(
        self,
        context: SolverContext,
        strength: float = 0.1,
        epsilon: float = 0.0,
        warmup: float = 0.5,
    ) -> None:
        super().__init__(context, strength, epsilon, warmup)
        self._proximal = EnvelopeSolver(context, strength)

    def proximal_step(self, optimizer: ProximalOptimizer) -> None:
        """Apply the proximal operator of the envelope."""
        # The inner solver normalised by the weights at construction; after a resume only
        # `self.unit_M` holds the units of the original start.
        self._proximal.unit_M = self.unit_M
        self._proximal.shrink(optimizer)
        self.gate_M = self._proximal.gate_M

    def gradient_factor(self, norm_M: Tensor) -> Tensor:
        """Return the factor of x in the gradient of the envelope: d_j / u_j."""
        allocation = self.context.allocation
        norm_LN, weight_LN = (
            allocation.constraint_rows(norm_M),
            allocation.constraint_rows(self.unit_M.square()),
        )
        return allocation.from_constraint_rows(
            value.gradient_factor(norm_LN, weight_LN, allocation.k_rows(1.0))
        )


class DebiasedSolver(Solver):
    """Homotopy of the debiased operator: ends with at most k groups, by construction.

    The ratio lam d goes from 0 to 1 and k from all groups to the target, so groups fade out
    gradually; kept groups are never shrunk (specification 1.2). It acts in the metric in which each
    layer has mean norm 1, so at ratio 1 it is the top k of `score`.
    """

    def __init__(self, context: SolverContext, reach: float = 1.0) -> None:
        super().__init__(context)
        self._reach = reach

    def shrink(self, optimizer: ProximalOptimizer) -> None:
        """Apply the operator at this point of the homotopy; at its end, select the top k."""
        ratio = self._reach * homotopy_ratio(self.progress)
        allocation, score_M = self.context.allocation, self.score()
        # The operator divides by 1 - ratio; its limit is hard selection.
        if ratio >= 1:
            scale_M = self.gate_M = allocation.select(score_M).double()
        else:
            # Scores instead of norms, with weight 1: the operator is applied in the normalised
            # metric, where one ratio holds for all layers. Factors do not depend on the unit, so
            # they apply to the weights as is.
            scale_M, self.gate_M = allocation.shrink(
                operators.prox_debiased, score_M, ProxParameters(ratio), self.progress
            )
        self.partition.scale_(scale_M)


def group_metric(solver: Solver, optimizer: ProximalOptimizer) -> Tensor | None:
    """Return the mean of the optimizer's metric over each group, [M]; None for a Euclidean step."""
    # A metric that varies inside a group has no closed-form operator and costs tens of passes
    # (specification 1.3); its mean over the group keeps one pass.
    if not optimizer.adaptive:
        return None
    return solver.partition.sum(optimizer.metric) / solver.partition.elements_M
