"""torch-pruning's own sparse training, GroupNorm and GrowingReg, as solvers.

Shapes: M groups of all families.

Penalties and rankings are the library's (DepGraph: Fang et al., 2023; Growing Reg: Wang et al.,
2021); the training loop, the number of groups and the fine-tuning are those of all solvers here.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import UserError
from methods.wgsef.groups.convolution import last_layer
from methods.wgsef.solvers.optimizers import ProximalOptimizer
from methods.wgsef.solvers.solver import Solver, SolverContext


class _TorchPruningSolver(Solver):
    """Lets a pruner of torch-pruning add to the gradients and rank the groups.

    Raises:
        UserError: the groups are not coupled filters, the only kind that torch-pruning knows.
    """

    def __init__(self, context: SolverContext, maker: str, importance: Any, **knobs: float) -> None:
        super().__init__(context, knobs["reg"])
        import torch_pruning

        kinds = {family.kind for family in context.partition.families}
        if kinds != {"filters"}:
            raise UserError(
                f"the torch-pruning solvers need groups=filters, got {', '.join(sorted(kinds))}"
            )
        self._pruner = _without_warnings(
            getattr(torch_pruning.pruner, maker),
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
        """Return the pruner's groups in the order of our families."""
        # Both graphs come from the same tracer, but on different copies of the network, so groups
        # are matched by name: a family is called after the first layer that produces its filters.
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

    Norms of a layer are divided by their mean, the library's default, or by their maximum
    (`normalizer="max"`), as its script for CIFAR does. The decay depends on neither, only the
    ranking across layers does.
    """

    def __init__(
        self, context: SolverContext, strength: float = 1e-4, normalizer: str = "mean"
    ) -> None:
        import torch_pruning

        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer=normalizer)
        super().__init__(context, "GroupNormPruner", importance, reg=strength)


class GrowingRegSolver(_TorchPruningSolver):
    """Weight decay of each group that grows each epoch, faster for weaker groups."""

    def __init__(
        self, context: SolverContext, strength: float = 1e-4, growth: float = 1e-3
    ) -> None:
        import torch_pruning

        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
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
        # The pruner keeps penalties by group object, which no file can hold; the order of groups is
        # that of the graph and the same after a resume.
        grown = {f"reg.{i}": reg for i, reg in enumerate(self._pruner.group_reg.values())}
        return {**super().state(), **grown}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the grown penalties."""
        super().load(state)
        for i, group in enumerate(self._pruner.group_reg):
            self._pruner.group_reg[group] = state[f"reg.{i}"]


def _without_warnings(make: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        # Its warnings concern parameters outside all groups; the user can do nothing about them.
        warnings.simplefilter("ignore")
        return make(*args, **kwargs)
