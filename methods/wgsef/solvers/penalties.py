"""Solvers that add the gradient of a penalty to the loss.

Group DeepHoyer and network slimming are implemented here. GroupNorm and GrowingReg use the
penalties and rankings of torch-pruning (DepGraph: Fang et al., 2023; Growing Reg: Wang et al.,
2021), with the training loop, budget and fine-tuning of all other solvers.

Shapes: M groups of all families, L families, N groups of the largest.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import UserError
from methods.wgsef.groups.convolution import last_layer, torch_pruning
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
        # At a zero group the penalty is not differentiable, and 0 is a subgradient. This also
        # clears the padding.
        factor_LN = torch.where(norm_LN > 0, factor_LN, 0.0)
        self.partition.add_to_gradients_(self._weight * self.partition.unpad(factor_LN))


class ReleasedDeepHoyerSolver(Solver):
    """Group Hoyer-square as in its authors' code (yanghr/DeepHoyer, structured form).

    The penalty is a sum over the weights W of all convolutions and linear layers, including the
    last one, of [(sum_c ||W[:, c]||)^2 + (sum_f ||W[f]||)^2] / ||W||_F^2. Filters and input
    channels of each layer are penalised separately, while `DeepHoyerSolver` has one norm for
    everything that is removed together. BatchNorm and biases are not penalised.
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
        # The Hoyer-square of an all-zero weight is undefined (0 / 0).
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
                raise no_scale_error(family.name)

    @torch.no_grad()
    def before_step(self, optimizer: ProximalOptimizer) -> None:
        """Add strength sign(gamma) to the gradient of each BatchNorm scale."""
        for name in self._scales:
            weight = self.partition.parameters[name]
            if weight.grad is not None:
                weight.grad.add_(weight.sign(), alpha=self._weight)

    def score(self) -> Tensor:
        """Return the mean |gamma| of each group, [M], not normalised by layer."""
        # As in the paper, there is one global threshold on |gamma|, which BatchNorm makes
        # comparable between layers. A coupled group may have several BatchNorms, hence the mean.
        chosen = self._scales
        parameters = self.partition.parameters
        total_M = self.partition.sum_named(
            lambda name: parameters[name].detach().abs() * (name in chosen)
        )
        count_M = self.partition.sum_named(
            lambda name: torch.full_like(parameters[name], float(name in chosen))
        )
        return total_M / count_M


def no_scale_error(family: str) -> UserError:
    """Build the error for groups that slimming cannot rank."""
    return UserError(
        f"slimming needs BatchNorm scales, but {family} has none: choose groups=filters of a "
        "network with BatchNorm"
    )


class _TorchPruningSolver(Solver):
    """Adapter of a pruner of torch-pruning, which adds to the gradients and ranks the groups.

    Raises:
        UserError: the groups are not coupled filters, the only kind that torch-pruning supports.
    """

    def __init__(self, context: SolverContext, maker: str, importance: Any, **knobs: float) -> None:
        super().__init__(context, knobs["reg"])
        kinds = {family.kind for family in context.partition.families}
        if kinds != {"filters"}:
            raise UserError(
                f"the torch-pruning solvers need groups=filters, got {', '.join(sorted(kinds))}"
            )
        self._pruner = _without_warnings(
            getattr(torch_pruning().pruner, maker),
            context.network,
            context.example,
            importance=importance,
            ignored_layers=[last_layer(context.network, context.example)],
            root_module_types=[nn.Conv2d, nn.Linear],
            **knobs,
        )
        self._groups = self._in_order(context)
        # Some versions of torch-pruning switch gradients off while they build the graph.
        context.network.requires_grad_(True)

    @torch.no_grad()
    def before_step(self, optimizer: ProximalOptimizer) -> None:
        """Add the pruner's penalty to the gradients."""
        self._pruner.regularize(self.context.network)

    @torch.no_grad()
    def score(self) -> Tensor:
        """Return the pruner's importance of each group, [M]."""
        parts = [self._pruner.estimate_importance(group) for group in self._groups]
        return torch.cat(parts).double()

    def _in_order(self, context: SolverContext) -> list[Any]:
        """Return the pruner's groups in the order of the partition's families."""
        # Both graphs come from the same tracer but from different copies of the network, so groups
        # are matched by name: a family is named after the first layer that produces its filters.
        by_layer: dict[str, Any] = {}
        names = {module: name for name, module in context.network.named_modules()}
        for group in self._pruner.DG.get_all_groups(
            ignored_layers=self._pruner.ignored_layers, root_module_types=[nn.Conv2d, nn.Linear]
        ):
            for item in group:
                if "out_channels" in item.dep.handler.__name__:
                    by_layer.setdefault(names.get(item.dep.target.module, ""), group)
        return [by_layer[family.name] for family in context.partition.families]


class GroupNormSolver(_TorchPruningSolver):
    """DepGraph's sparse training: weight decay that grows as a group's norm falls.

    For the ranking across layers, the norms of a layer are divided by their mean, the library's
    default, or by their maximum (`normalizer="max"`), as in its script for CIFAR. The decay does
    not depend on this.
    """

    def __init__(
        self, context: SolverContext, strength: float = 1e-4, normalizer: str = "mean"
    ) -> None:
        importance = torch_pruning().importance.GroupMagnitudeImportance(p=2, normalizer=normalizer)
        super().__init__(context, "GroupNormPruner", importance, reg=strength)


class GrowingRegSolver(_TorchPruningSolver):
    """Weight decay of each group that grows each epoch, faster for weaker groups."""

    def __init__(
        self, context: SolverContext, strength: float = 1e-4, growth: float = 1e-3
    ) -> None:
        importance = torch_pruning().importance.GroupMagnitudeImportance(p=2)
        knobs = {"reg": strength, "delta_reg": growth}
        super().__init__(context, "GrowingRegPruner", importance, **knobs)

    @torch.no_grad()
    def before_step(self, optimizer: ProximalOptimizer) -> None:
        """Add the penalty, raised at the start of each epoch."""
        if self.step % self.context.epoch == 0:
            self._pruner.update_reg()
        super().before_step(optimizer)

    def state(self) -> dict[str, Tensor]:
        """Return the grown penalties in addition to the base state."""
        # The pruner stores penalties by group object, which cannot be saved. Groups are numbered
        # instead: their order is that of the graph and the same after a resume.
        grown = {f"reg.{i}": reg for i, reg in enumerate(self._pruner.group_reg.values())}
        return {**super().state(), **grown}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the grown penalties."""
        super().load(state)
        for i, group in enumerate(self._pruner.group_reg):
            self._pruner.group_reg[group] = state[f"reg.{i}"]


def _without_warnings(make: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        # torch-pruning warns about parameters outside all groups, which the user cannot change.
        warnings.simplefilter("ignore")
        return make(*args, **kwargs)
