"""SGD and Adam whose step ends with a proximal operator.

Between the gradient and the next one a solver may act twice: `before` the step, when it may add to
gradients or look at the weights, and `after` it, when it shrinks or zeroes groups. Prox-SGD is
Algorithm 2 of arXiv 2212.12921. After Adam the operator has to act in Adam's own metric, or it is
no proximal step of the objective (WGSEF specification section 7).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


class Stepping(Protocol):
    """What a solver may ask of the optimizer that calls it."""

    adaptive: bool

    @property
    def rate(self) -> float:
        """The learning rate of this step."""

    def metric(self, parameter: Tensor) -> Tensor:
        """Return the metric of the step, elementwise; ones for a Euclidean step.

        The step is rate times gradient divided by metric.
        """


class Acting(Protocol):
    """What an optimizer asks of its solver."""

    def before(self, optimizer: Stepping) -> None:
        """Act on gradients, before the step."""

    def after(self, optimizer: Stepping) -> None:
        """Act on weights, after the step."""


class ProximalSGD(torch.optim.SGD):
    """Stochastic gradient descent with momentum, then the solver's operator."""

    adaptive = False

    def __init__(
        self,
        params: Iterable[Any],
        solver: Acting,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.solver = solver

    @property
    def rate(self) -> float:
        """The learning rate of this step."""
        return float(self.param_groups[0]["lr"])

    def metric(self, parameter: Tensor) -> Tensor:
        """Return ones: the step is Euclidean."""
        return torch.ones_like(parameter)

    def step(self, closure: Any = None) -> Any:
        """Take one step; `closure`, if given, computes loss and gradients first."""
        loss = _evaluate(closure)
        self.solver.before(self)
        super().step()
        self.solver.after(self)
        return loss


class ProximalAdam(torch.optim.AdamW):
    """Adam with decoupled weight decay, then the solver's operator in Adam's metric."""

    adaptive = True

    def __init__(
        self,
        params: Iterable[Any],
        solver: Acting,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)
        self.solver = solver

    @property
    def rate(self) -> float:
        """The learning rate of this step."""
        return float(self.param_groups[0]["lr"])

    def metric(self, parameter: Tensor) -> Tensor:
        """Return sqrt(v_hat) + eps, by which Adam has divided the step; ones before the first."""
        state = self.state.get(parameter)
        if not state:
            return torch.ones_like(parameter)
        beta, eps = self.param_groups[0]["betas"][1], self.param_groups[0]["eps"]
        second: Tensor = state["exp_avg_sq"]
        corrected: Tensor = second / (1 - beta ** float(state["step"]))
        return corrected.sqrt_().add_(eps)

    def step(self, closure: Any = None) -> Any:
        """Take one step; `closure`, if given, computes loss and gradients first."""
        loss = _evaluate(closure)
        self.solver.before(self)
        super().step()
        self.solver.after(self)
        return loss


def _evaluate(closure: Any) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
