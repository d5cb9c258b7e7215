"""Number of groups that may stay, and where: a budget for the network, per layer, or of a cost.

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
from methods.wgsef.groups.costs import GroupCosts
from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.prox.operators import Shrinkage
from methods.wgsef.solvers.schedules import cubic_sparsity

BudgetScope = Literal["global", "layer", "macs", "bytes"]
ProxOperator = Callable[..., Shrinkage]
"""`prox.envelope` or `prox.debiased`: norms, k, lam, and as keywords weight, metric, cost_LM."""


@dataclass(frozen=True)
class ProxParameters:
    """Parameters of a proximal operator besides the norms; tensors are [M], None means ones."""

    lam: float
    weight: Tensor | None = None
    metric: Tensor | None = None

    def named(self, shape: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the tensors as the operator's keyword arguments, in the shape of its rows."""
        both = {"weight": self.weight, "metric": self.metric}
        return {name: shape(value_M) for name, value_M in both.items() if value_M is not None}


class Allocation:
    """The budget: the fraction `sparsity` of all groups, or of their cost, that has to be removed.

    Each family keeps at least a fraction `floor` of its groups and at least one, since an empty
    layer would block the network: its strongest groups do not compete for a network-wide budget.

    Raises:
        UserError: the floors alone exceed the budget.
    """

    def __init__(
        self,
        partition: GroupPartition,
        sparsity: float,
        scope: BudgetScope = "global",
        floor: float = 0.05,
        costs: GroupCosts | None = None,
    ) -> None:
        self._partition, self._scope, self._costs = partition, scope, costs
        self._sparsity = sparsity
        floors = _floor_counts(partition.sizes, floor)
        self._floors = torch.tensor(floors, device=partition.device)
        self._protected = sum(floors)
        self._within_LF = torch.arange(max(floors), device=partition.device) < self._floors[:, None]
        self._size_L = torch.tensor(partition.sizes, dtype=torch.float64, device=partition.device)
        refuse_impossible_sparsity(partition.sizes, sparsity, scope, floor)

    def k(self, progress: float) -> int:
        """Return the number of groups of the whole network that may stay at this point."""
        return _kept_count(self._partition.groups, self._sparsity * cubic_sparsity(progress))

    def shrink(
        self, operator: ProxOperator, norm_M: Tensor, strength: ProxParameters, progress: float
    ) -> tuple[Tensor, Tensor]:
        """Return factors and gates [M] of a proximal operator under the budget of this point."""
        if self._scope == "layer":
            return self._shrink_layers(operator, norm_M, strength, progress)
        # The operator ranks groups by sqrt(d_j) ||t_j||; the floors must protect the top of the
        # same ranking.
        score_M = norm_M if strength.weight is None else strength.weight.sqrt() * norm_M
        held_M = self._strongest(score_M)
        k, costs = self._budget(score_M, held_M, progress)
        # The protected groups use up the whole budget, and the operators need k > 0.
        if k <= 0:
            return held_M.double(), held_M.double()
        named = strength.named(lambda value_M: value_M[None])
        shrunk = operator(norm_M.masked_fill(held_M, 0)[None], k, strength.lam, **named, **costs)
        # Protected groups were passed as empty ones, which an operator returns as zero, so that
        # they neither use the budget nor get shrunk.
        return shrunk.scale[0].masked_fill_(held_M, 1), shrunk.gate[0].masked_fill(held_M, 1)

    def select(self, score_M: Tensor, progress: float = 1.0) -> Tensor:
        """Return a mask [M] of the groups of highest score that the budget of this point allows."""
        if self._scope in ("macs", "bytes"):
            return self._affordable(score_M, progress)
        if self._scope == "layer":
            rank_LN = _ranks(self._partition.rows(score_M))
            return self._partition.flat(rank_LN < self._counts(progress)[:, None])
        # Protected groups rank before all others.
        boosted_M = torch.where(self._strongest(score_M), torch.inf, score_M)
        return _ranks(boosted_M[None])[0] < self.k(progress)

    def rows(self, values_M: Tensor) -> Tensor:
        """Return the values in rows, each with its own number of groups to keep."""
        if self._scope in ("macs", "bytes"):
            raise UserError(
                f"scope={self._scope} fixes a cost and not the number of groups that this solver "
                "needs: use scope=global or scope=layer"
            )
        return self._partition.rows(values_M) if self._scope == "layer" else values_M[None]

    def flat(self, values_LN: Tensor) -> Tensor:
        """Return values in the layout of `rows` as [M] again."""
        return self._partition.flat(values_LN) if self._scope == "layer" else values_LN[0]

    def k_rows(self, progress: float) -> Tensor:
        """Return the number of groups that each of the `rows` may keep at this point."""
        if self._scope == "layer":
            return self._counts(progress)
        return torch.tensor([float(self.k(progress))], device=self._partition.device)

    def _budget(
        self, score_M: Tensor, held_M: Tensor, progress: float
    ) -> tuple[float, dict[str, Tensor]]:
        """Return the joint budget of the groups outside the floors, and their costs if any."""
        if self._scope == "global":
            return float(self.k(progress) - self._protected), {}
        cost_M = self._group_costs()
        # The true cost is bilinear and no sum over groups, but the operators need a linear budget:
        # the linear cost of a selection that meets the true budget stands in for it.
        afforded_M = self._affordable(score_M, progress) & ~held_M
        return float((cost_M * afforded_M).sum()), {"cost_LM": cost_M[None]}

    def _shrink_layers(
        self, operator: ProxOperator, norm_M: Tensor, strength: ProxParameters, progress: float
    ) -> tuple[Tensor, Tensor]:
        """Solve one equation per family, all at once."""
        rows, flat = self._partition.rows, self._partition.flat
        # Padding has norm 0 and is never kept, but weight and metric are divided by: it must not be
        # 0 there.
        padding_LN = 1 - rows(torch.ones_like(norm_M))
        named = strength.named(lambda value_M: rows(value_M) + padding_LN)
        shrunk = operator(rows(norm_M), self._counts(progress), strength.lam, **named)
        return flat(shrunk.scale), flat(shrunk.gate)

    def _counts(self, progress: float) -> Tensor:
        """Return the number of groups that each family may keep."""
        # 1e-9 before the floor: 0.29 * 100 is 28.999... in floating point and must remove 29.
        gone_L = (self._sparsity * cubic_sparsity(progress) * self._size_L + 1e-9).floor()
        return (self._size_L - gone_L).maximum(self._floors.double())

    def _strongest(self, score_M: Tensor) -> Tensor:
        """Return a mask [M] of the groups that the floors protect."""
        score_LN = self._partition.rows(score_M)
        # All families take as many as the largest floor needs; `_within_LF` masks the surplus of
        # the others.
        place_LF = score_LN.topk(self._within_LF.shape[1], -1).indices
        protected_LN = torch.zeros_like(score_LN, dtype=torch.bool)
        return self._partition.flat(protected_LN.scatter_(-1, place_LF, self._within_LF))

    def _group_costs(self) -> Tensor:
        assert self._costs is not None
        cost_F = self._costs.per_group().to(self._partition.device)
        return cost_F.repeat_interleave(self._size_L.long())

    def _affordable(self, score_M: Tensor, progress: float) -> Tensor:
        """Return a mask [M] of the longest prefix of a ranking whose true cost is in budget."""
        assert self._costs is not None
        # Score over root of cost is the order in which the relaxed budget sum c u = K admits groups
        # (specification 1.3). Each prefix's cost is exact, since it depends only on counts per
        # family.
        worth_M = score_M / self._group_costs().sqrt()
        worth_M = torch.where(self._strongest(score_M), torch.inf, worth_M)
        order_M = worth_M.argsort(stable=True, descending=True)
        family_M = torch.arange(len(self._size_L)).repeat_interleave(self._size_L.long().cpu())
        admitted_MF = torch.nn.functional.one_hot(family_M[order_M.cpu()]).cumsum(0)
        budget = (1 - self._sparsity * cubic_sparsity(progress)) * self._costs.dense()
        # Removing more groups never costs more, so the prefixes that fit are the first ones and
        # their number is the length of the longest.
        fits_M = self._costs.total(admitted_MF) <= budget
        count = max(self._protected, int(fits_M.sum()))
        kept_M = torch.zeros_like(score_M, dtype=torch.bool)
        kept_M[order_M[:count]] = True
        return kept_M


def refuse_impossible_sparsity(
    sizes: Sequence[int], sparsity: float, scope: BudgetScope, floor: float
) -> None:
    """Raise if the floors of families of these sizes exceed what a network may keep."""
    k, floors = _kept_count(sum(sizes), sparsity), sum(_floor_counts(sizes, floor))
    if scope == "global" and floors > k:
        raise UserError(
            f"a sparsity of {sparsity:g} leaves {k} of {sum(sizes)} groups, fewer than the "
            f"floors of all layers together ({floors}): lower the sparsity or floor={floor:g}"
        )


def _kept_count(groups: int, sparsity: float) -> int:
    return groups - int(sparsity * groups + 1e-9)


def _floor_counts(sizes: Sequence[int], floor: float) -> list[int]:
    return [max(1, math.ceil(floor * size)) for size in sizes]


def _ranks(score_LN: Tensor) -> Tensor:
    """Return the rank of each score in its row, 0 for the highest; ties by position."""
    # Stable, so that equal scores give the same selection on each device and after a resume.
    order_LN = score_LN.argsort(stable=True, dim=-1, descending=True)
    place_LN = torch.arange(score_LN.shape[-1], device=score_LN.device).expand_as(order_LN)
    return torch.empty_like(order_LN).scatter_(-1, order_LN, place_LN)
