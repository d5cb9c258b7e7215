"""Solvers that add the gradient of a penalty to the loss: group DeepHoyer and network slimming.

Shapes: M groups of all families, L families, N groups of the largest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.errors import UserError
from methods.wgsef.solvers.optimizers import ProximalOptimizer
from methods.wgsef.solvers.solver import Solver, SolverContext


class DeepHoyerSolver(Solver):
    """The group Hoyer-square penalty of each layer (Yang, Wen and Li, 2020).

    H(v) = (sum_j ||v_j||)^2 / sum_j ||v_j||^2, added with weight `strength` per family. It is
    invariant to scale, so its gradient moves weight from small groups to large ones.
    """

    def __init__(self, context: SolverContext, strength: float) -> None:
        super().__init__(context, strength)
        self._weight = strength

    @torch.no_grad()
    def before_step(self, optimizer: ProximalOptimizer) -> None:
        """Add strength dH/dv_j = strength (2 S / (Q ||v_j||) - 2 S^2 / Q^2) v_j."""
        norm_M = self.partition.norms()
        norm_LN = self.partition.pad_by_family(norm_M)
        sum_L1 = norm_LN.sum(-1, keepdim=True)
        square_L1 = norm_LN.square().sum(-1, keepdim=True)
        factor_LN = 2 * sum_L1 / square_L1 * (1 / norm_LN - sum_L1 / square_L1)
        # At a zero group the penalty has a kink; 0 is a subgradient there. This also clears the
        # padding.
        factor_LN = torch.where(norm_LN > 0, factor_LN, 0.0)
        self.partition.add_to_gradients_(self._weight * self.partition.unpad(factor_LN))


class ReleasedDeepHoyerSolver(Solver):
    """Group Hoyer-square as its authors' code has it (yanghr/DeepHoyer, structured form).

    Per weight W of a convolution or linear layer, the last one included,
    [(sum_c ||W[:, c]||)^2 + (sum_f ||W[f]||)^2] / ||W||_F^2: filters and input channels of each
    layer on its own, where `DeepHoyerSolver` has one norm for all that leaves together. BatchNorm
    and biases are free.
    """

    def __init__(self, context: SolverContext, strength: float) -> None:
        super().__init__(context, strength)
        self._weight = strength
        self._tensors = [
            module.weight
            for module in context.network.modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        ]

    def before_step(self, optimizer: ProximalOptimizer) -> None:
        """Add the penalty's gradient; a row or channel of zeros gets the subgradient 0."""
        # A weight of zeros has no Hoyer-square, and nothing to push further.
        tensors = [weight for weight in self._tensors if bool(weight.detach().any())]
        if not tensors:
            return
        with torch.enable_grad():
            penalty = torch.stack([hoyer_square(weight) for weight in tensors]).sum()
            slopes = torch.autograd.grad(penalty, tensors)
        for weight, slope in zip(tensors, slopes, strict=True):
            if weight.grad is not None:
                weight.grad.add_(slope, alpha=self._weight)


def hoyer_square(weight: Tensor) -> Tensor:
    """Return the Hoyer-square of a weight's filters plus that of its input channels."""
    matrix = weight.flatten(2) if weight.ndim > 2 else weight[..., None]
    filters = torch.linalg.vector_norm(matrix, dim=(1, 2)).sum()
    channels = torch.linalg.vector_norm(matrix, dim=(0, 2)).sum()
    measure: Tensor = (filters.square() + channels.square()) / matrix.square().sum()
    return measure


class SlimmingSolver(Solver):
    """Network slimming (Liu et al., 2017): an L1 penalty on BatchNorm scales, ranked by them.

    Raises:
        UserError: a family of groups has no BatchNorm scale.
    """

    def __init__(self, context: SolverContext, strength: float) -> None:
        super().__init__(context, strength)
        self._weight = strength
        network = context.network
        norms = [n for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)]
        self._scales = {f"{name}.weight" for name in norms}
        for family in context.partition.families:
            if not any(owned.tensor in self._scales for owned in family.owned_slices):
                raise UserError(f"slimming needs BatchNorm scales, but {family.name} has none")

    @torch.no_grad()
    def before_step(self, optimizer: ProximalOptimizer) -> None:
        """Add strength sign(gamma) to the gradient of each BatchNorm scale."""
        for name in self._scales:
            weight = self.partition.parameters[name]
            if weight.grad is not None:
                weight.grad.add_(weight.sign(), alpha=self._weight)

    def score(self) -> Tensor:
        """Return the mean |gamma| of each group, [M], not normalised by layer."""
        # As in the paper: one global threshold on |gamma|, which BatchNorm makes comparable across
        # layers. A coupled group has several BatchNorms, so it is their mean.
        chosen = self._scales
        parameters = self.partition.parameters
        total_M = self.partition.sum_named(
            lambda name: parameters[name].detach().abs() * (name in chosen)
        )
        count_M = self.partition.sum_named(
            lambda name: torch.full_like(parameters[name], float(name in chosen))
        )
        return total_M / count_M
