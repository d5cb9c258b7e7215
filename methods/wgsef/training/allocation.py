"""How many groups may stay, and where: one budget for the network, one per layer, or a cost.

Shapes: M groups of all families, L families, N groups of the largest, 1 the whole network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bench.errors import UserError
from methods.wgsef.envelope.prox import Shrinkage
from methods.wgsef.groups.costs import Costs
from methods.wgsef.groups.partition import Partition
from methods.wgsef.training.schedule import cubic

Scope = Literal["global", "layer", "macs", "bytes"]
Operator = Callable[..., Shrinkage]
"""`prox.envelope` or `prox.debiased`: norms, k, lam and by name weight, metric, cost_LM."""


@dataclass(frozen=True)
class Strength:
    """What a proximal operator is told beside the norms; tensors are [M], None stands for ones."""

    lam: float
    weight: Tensor | None = None
    metric: Tensor | None = None

    def named(self, shape: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the tensors by the operator's own names, brought into the shape of its rows."""
        both = {"weight": self.weight, "metric": self.metric}
        return {name: shape(value_M) for name, value_M in both.items() if value_M is not None}


class Allocation:
    """The budget: which share `sparsity` of all groups, or of the cost, has to go.

    Every family keeps at least a share `floor` of its groups and at least one, lest a layer
    close: its strongest groups stand outside the competition for a network-wide budget.

    Raises:
        UserError: the floors alone exceed the budget, or there is nothing to remove.
    """

    def __init__(
        self,
        partition: Partition,
        sparsity: float,
        scope: Scope = "global",
        floor: float = 0.05,
        costs: Costs | None = None,
    ) -> None:
        self._partition, self._scope, self._costs = partition, scope, costs
        self._sparsity = sparsity
        floors = _floors(partition.sizes, floor)
        self._floors = torch.tensor(floors, device=partition.device)
        self._protected = sum(floors)
        self._within_LF = torch.arange(max(floors), device=partition.device) < self._floors[:, None]
        self._size_L = torch.tensor(partition.sizes, dtype=torch.float64, device=partition.device)
        refuse_impossible(partition.sizes, sparsity, scope, floor)

    def k(self, progress: float) -> int:
        """Return how many groups of the whole network may stay at this point."""
        return _staying(self._partition.groups, self._sparsity * cubic(progress))

    def shrink(
        self, operator: Operator, norm_M: Tensor, strength: Strength, progress: float
    ) -> tuple[Tensor, Tensor]:
        """Return factors and gates [M] of a proximal operator under the budget of this point."""
        if self._scope == "layer":
            return self._shrink_layers(operator, norm_M, strength, progress)
        score_M = norm_M if strength.weight is None else strength.weight.sqrt() * norm_M
        held_M = self._strongest(score_M)
        k, costs = self._budget(score_M, held_M, progress)
        if k <= 0:
            return held_M.double(), held_M.double()
        named = strength.named(lambda value_M: value_M[None])
        shrunk = operator(norm_M.masked_fill(held_M, 0)[None], k, strength.lam, **named, **costs)
        # Groups outside the competition entered it as empty ones and came back as zero.
        return shrunk.scale[0].masked_fill_(held_M, 1), shrunk.gate[0].masked_fill(held_M, 1)

    def select(self, score_M: Tensor, progress: float = 1.0) -> Tensor:
        """Return the groups [M] of the highest scores that the budget of this point affords."""
        if self._scope in ("macs", "bytes"):
            return self._affordable(score_M, progress)
        if self._scope == "layer":
            rank_LN = _ranks(self._partition.rows(score_M))
            return self._partition.flat(rank_LN < self._counts(progress)[:, None])
        # What is protected sorts before everything else.
        boosted_M = torch.where(self._strongest(score_M), torch.inf, score_M)
        return _ranks(boosted_M[None])[0] < self.k(progress)

    def rows(self, values_M: Tensor) -> Tensor:
        """Return the values as rows that have a number of groups of their own to keep."""
        if self._scope in ("macs", "bytes"):
            raise UserError(f"a budget in {self._scope} does not say how many groups to keep")
        return self._partition.rows(values_M) if self._scope == "layer" else values_M[None]

    def flat(self, values_LN: Tensor) -> Tensor:
        """Return the values of `rows` as [M] again."""
        return self._partition.flat(values_LN) if self._scope == "layer" else values_LN[0]

    def k_rows(self, progress: float) -> Tensor:
        """Return how many groups each of the `rows` may keep at this point."""
        if self._scope == "layer":
            return self._counts(progress)
        return torch.tensor([float(self.k(progress))], device=self._partition.device)

    def _budget(
        self, score_M: Tensor, held_M: Tensor, progress: float
    ) -> tuple[float, dict[str, Tensor]]:
        """Return what the groups outside the floors may use together, and their costs if any."""
        if self._scope == "global":
            return float(self.k(progress) - self._protected), {}
        cost_M = self._group_costs()
        afforded_M = self._affordable(score_M, progress) & ~held_M
        return float((cost_M * afforded_M).sum()), {"cost_LM": cost_M[None]}

    def _shrink_layers(
        self, operator: Operator, norm_M: Tensor, strength: Strength, progress: float
    ) -> tuple[Tensor, Tensor]:
        """Solve one equation per family, all at once."""
        rows, flat = self._partition.rows, self._partition.flat
        padding_LN = 1 - rows(torch.ones_like(norm_M))
        named = strength.named(lambda value_M: rows(value_M) + padding_LN)
        shrunk = operator(rows(norm_M), self._counts(progress), strength.lam, **named)
        return flat(shrunk.scale), flat(shrunk.gate)

    def _counts(self, progress: float) -> Tensor:
        """Return how many groups each family may keep."""
        gone_L = (self._sparsity * cubic(progress) * self._size_L + 1e-9).floor()
        return (self._size_L - gone_L).maximum(self._floors.double())

    def _strongest(self, score_M: Tensor) -> Tensor:
        """Return the groups [M] that the floors protect."""
        score_LN = self._partition.rows(score_M)
        place_LF = score_LN.topk(self._within_LF.shape[1], -1).indices
        protected_LN = torch.zeros_like(score_LN, dtype=torch.bool)
        return self._partition.flat(protected_LN.scatter_(-1, place_LF, self._within_LF))

    def _group_costs(self) -> Tensor:
        assert self._costs is not None
        cost_F = self._costs.per_group().to(self._partition.device)
        return cost_F.repeat_interleave(self._size_L.long())

    def _affordable(self, score_M: Tensor, progress: float) -> Tensor:
        """Return the longest prefix by score per root of cost that the true cost affords.

        That order is the one in which the relaxed budget sum c u = K admits groups
        (specification 1.3); the cost of each prefix is exact.
        """
        assert self._costs is not None
        worth_M = score_M / self._group_costs().sqrt()
        worth_M = torch.where(self._strongest(score_M), torch.inf, worth_M)
        order_M = worth_M.argsort(stable=True, descending=True)
        family_M = torch.arange(len(self._size_L)).repeat_interleave(self._size_L.long().cpu())
        admitted_MF = torch.nn.functional.one_hot(family_M[order_M.cpu()]).cumsum(0)
        budget = (1 - self._sparsity * cubic(progress)) * self._costs.dense()
        fits_M = self._costs.total(admitted_MF) <= budget
        count = max(self._protected, int(fits_M.sum()))
        kept_M = torch.zeros_like(score_M, dtype=torch.bool)
        kept_M[order_M[:count]] = True
        return kept_M


def refuse_impossible(sizes: Sequence[int], sparsity: float, scope: Scope, floor: float) -> None:
    """Raise when the floors of all families, of these sizes, exceed what a network may keep."""
    k, floors = _staying(sum(sizes), sparsity), sum(_floors(sizes, floor))
    if scope == "global" and floors > k:
        raise UserError(
            f"a sparsity of {sparsity:g} leaves {k} of {sum(sizes)} groups, "
            f"fewer than the floors of all layers together ({floors})"
        )


def _staying(groups: int, sparsity: float) -> int:
    return groups - int(sparsity * groups + 1e-9)


def _floors(sizes: Sequence[int], floor: float) -> list[int]:
    return [max(1, math.ceil(floor * size)) for size in sizes]


def _ranks(score_LN: Tensor) -> Tensor:
    """Return the place of every score in its row, 0 for the highest; ties by position."""
    order_LN = score_LN.argsort(stable=True, dim=-1, descending=True)
    place_LN = torch.arange(score_LN.shape[-1], device=score_LN.device).expand_as(order_LN)
    return torch.empty_like(order_LN).scatter_(-1, order_LN, place_LN)
