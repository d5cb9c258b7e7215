"""SGD and Adam whose step ends with a proximal operator.

A solver may act twice per step: in `before_step`, to add to gradients or read the weights, and in
`after_step`, to shrink or zero groups. Prox-SGD is Algorithm 2 of arXiv 2212.12921. With Adam the
operator has to act in Adam's metric, otherwise the step is not a proximal step of the objective
(WGSEF specification section 7).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


class ProximalOptimizer(Protocol):
    """What a solver needs to know about the optimizer."""

    adaptive: bool

    @property
    def rate(self) -> float:
        """Learning rate of this step."""

    def metric(self, parameter: Tensor) -> Tensor:
        """Return the metric of the step, elementwise; ones for a Euclidean step.

        The step is rate times gradient divided by metric.
        """


class StepHooks(Protocol):
    """The methods of a solver that the optimizer calls."""

    def before_step(self, optimizer: ProximalOptimizer) -> None:
        """Change gradients, before the step."""

    def after_step(self, optimizer: ProximalOptimizer) -> None:
        """Change weights, after the step."""


class _SolverSteps(torch.optim.Optimizer):
    """Base of both optimizers: the solver acts before and after the step of the base class."""

    # Set by the subclasses, because torch's constructors take no further arguments.
    adaptive: bool
    solver: StepHooks

    @property
    def rate(self) -> float:
        """Learning rate of this step."""
        return float(self.param_groups[0]["lr"])

    def step(self, closure: Any = None) -> Any:
        """Take one step; `closure`, if given, computes loss and gradients first."""
        loss = None
        if closure is not None:
            # torch's own `step` runs a closure like this, but here it must run before the solver's
            # `before_step`.
            with torch.enable_grad():
                loss = closure()
        self.solver.before_step(self)
        super().step()
        self.solver.after_step(self)
        return loss

    def metric(self, parameter: Tensor) -> Tensor:
        """Return ones: the step is Euclidean."""
        return torch.ones_like(parameter)


class ProximalSGD(_SolverSteps, torch.optim.SGD):
    """Stochastic gradient descent with momentum, followed by the solver's operator."""

    adaptive = False

    def __init__(
        self,
        params: Iterable[Any],
        solver: StepHooks,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(
            params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov
        )
        self.solver = solver


class ProximalAdam(_SolverSteps, torch.optim.AdamW):
    """Adam with decoupled weight decay, followed by the solver's operator in Adam's metric."""

    adaptive = True

    def __init__(
        self,
        params: Iterable[Any],
        solver: StepHooks,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)
        self.solver = solver

    def metric(self, parameter: Tensor) -> Tensor:
        """Return sqrt(v_hat) + eps, by which Adam divides the step; ones before the first step."""
        state = self.state.get(parameter)
        if not state:
            return torch.ones_like(parameter)
        beta, eps = self.param_groups[0]["betas"][1], self.param_groups[0]["eps"]
        second: Tensor = state["exp_avg_sq"]
        # torch.optim.AdamW stores the uncorrected second moment and the step count; eps is added
        # after the root, as there.
        corrected: Tensor = second / (1 - beta ** float(state["step"]))
        return corrected.sqrt_().add_(eps)
