"""Budgets of groups: how many may be kept in the network, per layer, per form, or at what cost.

Shapes: M groups of all families, L families, R forms, N groups of the largest family (or row), F
groups that the largest floor protects, C columns of the cost table.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bench.errors import UserError
from methods.wgsef.groups.choice import refuse_unfit_pattern
from methods.wgsef.groups.costs import GroupCosts
from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.prox.operators import Shrinkage
from methods.wgsef.solvers.schedules import cubic_sparsity

BudgetScope = Literal["global", "layer", "isomorphic", "pattern"]
ProxOperator = Callable[..., Shrinkage]
"""`prox_envelope` or `prox_debiased`: norms, k, lam, and as keywords weight, metric, cost_LM."""


@dataclass(frozen=True)
class ProxParameters:
    """Parameters of a proximal operator besides the norms; tensors are [M], None means ones."""

    lam: float
    weight: Tensor | None = None
    metric: Tensor | None = None

    @property
    def ridge(self) -> Tensor | float:
        """The ridge lam d_j / h_j with which the envelope decays a whole group."""
        weight = 1.0 if self.weight is None else self.weight
        return self.lam * weight / (1.0 if self.metric is None else self.metric)

    def ranking(self, norm_M: Tensor) -> Tensor:
        """Return sqrt(d_j) ||t_j|| [M], by which the operators rank groups."""
        return norm_M if self.weight is None else self.weight.sqrt() * norm_M

    def as_keywords(self, to_rows: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the tensors as keyword arguments of an operator, brought into its layout."""
        both = {"weight": self.weight, "metric": self.metric}
        return {name: to_rows(value_M) for name, value_M in both.items() if value_M is not None}


class Allocation(ABC):
    """A budget: the fraction `sparsity` of all groups, or of their cost, must be removed.

    Each family keeps at least the fraction `floor` of its groups and at least one group, since an
    empty layer would block the network. Methods take the `progress` of the sparse training, 0 to 1,
    because the budget tightens gradually (`schedules.cubic_sparsity`).
    """

    def __init__(self, partition: GroupPartition, sparsity: float, floor: float = 0.05) -> None:
        self._partition, self._sparsity = partition, sparsity
        floors = self._floors_of(partition, floor)
        self._floors = torch.tensor(floors, device=partition.device)
        self._size_L = torch.tensor(partition.sizes, dtype=torch.float64, device=partition.device)
        ranks_F = torch.arange(int(self._floors.max()), device=partition.device)
        self._within_LF = ranks_F < self._floors[:, None]

    def _floors_of(self, partition: GroupPartition, floor: float) -> list[int]:
        """Return the minimum number of groups that each family keeps."""
        return _floor_counts(partition.sizes, floor)

    def k(self, progress: float) -> int:
        """Return the number of groups of the whole network that may be kept at this progress."""
        return _kept_count(self._partition.groups, self._sparsity * cubic_sparsity(progress))

    def used(self, kept_M: Tensor) -> dict[str, str | float]:
        """Return the budget's unit and its amount in the dense network and for the kept groups."""
        return {"unit": "groups", "dense": self._partition.groups, "kept": int(kept_M.sum())}

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed training must not measure again; it is loaded in place."""
        return {}

    @abstractmethod
    def shrink(
        self, operator: ProxOperator, norm_M: Tensor, strength: ProxParameters, progress: float
    ) -> tuple[Tensor, Tensor]:
        """Return factors and gates [M] of a proximal operator under the budget at `progress`."""

    @abstractmethod
    def select(self, score_M: Tensor, progress: float = 1.0) -> Tensor:
        """Return a mask [M] of the groups of highest score that the budget at `progress` allows."""

    def _strongest(self, score_M: Tensor) -> Tensor:
        """Return a mask [M] of the groups that the floors protect."""
        score_LN = self._partition.pad_by_family(score_M)
        # `topk` takes as many groups of each family as the largest floor; `_within_LF` masks the
        # surplus of families with a smaller floor.
        index_LF = score_LN.topk(self._within_LF.shape[1], -1).indices
        protected_LN = torch.zeros_like(score_LN, dtype=torch.bool)
        return self._partition.unpad(protected_LN.scatter_(-1, index_LF, self._within_LF))

    @abstractmethod
    def constraint_rows(self, values_M: Tensor) -> Tensor:
        """Return the values as rows, each of which has its own number of groups to keep."""

    @abstractmethod
    def from_constraint_rows(self, values_LN: Tensor) -> Tensor:
        """Return values in the layout of `constraint_rows` as [M]."""

    @abstractmethod
    def k_rows(self, progress: float) -> Tensor:
        """Return the number of groups that each of the `constraint_rows` may keep."""


class _RowAllocation(Allocation):
    """A separate budget for each of the `constraint_rows`."""

    def shrink(
        self, operator: ProxOperator, norm_M: Tensor, strength: ProxParameters, progress: float
    ) -> tuple[Tensor, Tensor]:
        """Solve one equation per row, all at once."""
        pad, unpad = self.constraint_rows, self.from_constraint_rows
        # Padding has norm 0 and is never kept. In weight and metric, which are divided by, it must
        # not be 0.
        padding_LN = 1 - pad(torch.ones_like(norm_M))
        keywords = strength.as_keywords(lambda value_M: pad(value_M) + padding_LN)
        shrunk = operator(pad(norm_M), self.k_rows(progress), strength.lam, **keywords)
        return unpad(shrunk.scale), unpad(shrunk.gate)

    def select(self, score_M: Tensor, progress: float = 1.0) -> Tensor:
        """Return a mask [M] of each row's groups of highest score."""
        rank_LN = _ranks(self.constraint_rows(score_M))
        return self.from_constraint_rows(rank_LN < self.k_rows(progress)[:, None])


class LayerAllocation(_RowAllocation):
    """A budget per family: each loses the same fraction of its groups."""

    def constraint_rows(self, values_M: Tensor) -> Tensor:
        """Return the values with one row per family."""
        return self._partition.pad_by_family(values_M)

    def from_constraint_rows(self, values_LN: Tensor) -> Tensor:
        """Return values with one row per family as [M]."""
        return self._partition.unpad(values_LN)

    def k_rows(self, progress: float) -> Tensor:
        """Return the number of groups that each family may keep."""
        # 1e-9 before the floor: 0.29 * 100 is 28.999... in floating point and must remove 29.
        removed_L = (self._sparsity * cubic_sparsity(progress) * self._size_L + 1e-9).floor()
        return (self._size_L - removed_L).maximum(self._floors.double())


class IsomorphicAllocation(_RowAllocation):
    """A budget per form: all families of one form together lose the fraction `sparsity`.

    This is Isomorphic Pruning (Fang et al., ECCV 2024): groups compete only with groups of layers
    that are coupled in the same way. It differs from torch-pruning in two cases. Every family keeps
    its floor, while torch-pruning does not prune a layer that would lose everything. Among equal
    scores the first groups are kept, while torch-pruning removes all of them.
    """

    def __init__(self, partition: GroupPartition, sparsity: float, floor: float = 0.05) -> None:
        super().__init__(partition, sparsity, floor)
        forms = [family.form for family in partition.families]
        rows = {form: row for row, form in enumerate(dict.fromkeys(forms))}
        row_L = torch.tensor([rows[form] for form in forms])
        row_M = row_L.repeat_interleave(torch.tensor(partition.sizes))
        self._member_RM = (torch.arange(len(rows))[:, None] == row_M).to(partition.device)
        self._size_R = self._member_RM.sum(1).double()
        floor_R = torch.zeros(len(rows), dtype=torch.float64)
        self._floor_R = floor_R.index_add_(0, row_L, self._floors.cpu().double())
        self._floor_R = self._floor_R.to(partition.device)
        width = int(self._size_R.max())
        within_M = self._member_RM.cumsum(1).masked_fill(~self._member_RM, 0).sum(0) - 1
        self._padded_M = row_M.to(partition.device) * width + within_M
        self._shape = (len(rows), width)

    def k(self, progress: float) -> int:
        """Return the number of groups of the whole network that may be kept at this progress."""
        return int(self.k_rows(progress).sum())

    def constraint_rows(self, values_M: Tensor) -> Tensor:
        """Return the values with one row per form."""
        rows, width = self._shape
        flat = values_M.new_zeros(rows * width)
        return flat.index_copy_(0, self._padded_M, values_M).view(rows, width)

    def from_constraint_rows(self, values_LN: Tensor) -> Tensor:
        """Return values with one row per form as [M]."""
        return values_LN.flatten()[self._padded_M]

    def k_rows(self, progress: float) -> Tensor:
        """Return the number of groups that each form may keep."""
        removed_R = (self._sparsity * cubic_sparsity(progress) * self._size_R + 1e-9).floor()
        return (self._size_R - removed_R).maximum(self._floor_R)

    def shrink(
        self, operator: ProxOperator, norm_M: Tensor, strength: ProxParameters, progress: float
    ) -> tuple[Tensor, Tensor]:
        """Solve one equation per form for the groups outside the floors."""
        held_M = self._strongest(strength.ranking(norm_M))
        padding_LN = 1 - self.constraint_rows(torch.ones_like(norm_M))
        keywords = strength.as_keywords(lambda value_M: self.constraint_rows(value_M) + padding_LN)
        left_R = self.k_rows(progress) - self._floor_R
        # The operators need k > 0. Rows whose floors use up the budget get k = 1 and are discarded.
        free_LN = self.constraint_rows(norm_M.masked_fill(held_M, 0))
        shrunk = operator(free_LN, left_R.clamp_min(1), strength.lam, **keywords)
        used_LN = (left_R > 0)[:, None]
        scale_M = self.from_constraint_rows(torch.where(used_LN, shrunk.scale, 0.0))
        gate_M = self.from_constraint_rows(torch.where(used_LN, shrunk.gate, 0.0))
        return scale_M.masked_fill(held_M, 1), gate_M.masked_fill(held_M, 1)

    def select(self, score_M: Tensor, progress: float = 1.0) -> Tensor:
        """Return a mask [M] of each form's groups of highest score, floors first."""
        return super().select(torch.where(self._strongest(score_M), torch.inf, score_M), progress)


class PatternAllocation(_RowAllocation):
    """Keep N of every M consecutive groups of a family: N:M sparsity if groups are single weights.

    Each run of M groups is a row with its own budget, so there is no floor.

    Raises:
        UserError: the number of groups of a family is not a multiple of M.
    """

    def __init__(self, partition: GroupPartition, kept: int, of: int) -> None:
        super().__init__(partition, 1 - kept / of, floor=0)
        refuse_unfit_pattern(partition.families, kept, of)
        self._kept, self._of = kept, of

    def k(self, progress: float) -> int:
        """Return the number of groups of the whole network that may be kept at this progress."""
        return self._partition.groups // self._of * self._kept_per_run(progress)

    def constraint_rows(self, values_M: Tensor) -> Tensor:
        """Return the values with one row per run."""
        return values_M.reshape(-1, self._of)

    def from_constraint_rows(self, values_LN: Tensor) -> Tensor:
        """Return values with one row per run as [M]."""
        return values_LN.flatten()

    def k_rows(self, progress: float) -> Tensor:
        """Return the number of groups that each run may keep."""
        rows = self._partition.groups // self._of
        kept = float(self._kept_per_run(progress))
        return torch.full((rows,), kept, device=self._partition.device)

    def _kept_per_run(self, progress: float) -> int:
        removed = (self._of - self._kept) * cubic_sparsity(progress)
        return self._of - int(removed + 1e-9)


class _NetworkAllocation(Allocation):
    """One budget for the whole network.

    The strongest groups of each family, as many as its floor, are always kept; only the others
    compete for the rest of the budget.
    """

    def __init__(self, partition: GroupPartition, sparsity: float, floor: float = 0.05) -> None:
        super().__init__(partition, sparsity, floor)
        self._protected = int(self._floors.sum())

    def shrink(
        self, operator: ProxOperator, norm_M: Tensor, strength: ProxParameters, progress: float
    ) -> tuple[Tensor, Tensor]:
        """Solve one equation for all groups outside the floors."""
        # The floors must protect the top of the ranking that the operator uses.
        score_M = strength.ranking(norm_M)
        held_M = self._strongest(score_M)
        k, costs = self._joint_budget(score_M, held_M, progress)
        # The floors use up the whole budget; the operators need k > 0.
        if k <= 0:
            return held_M.double(), held_M.double()
        keywords = strength.as_keywords(lambda value_M: value_M[None])
        free_M = norm_M.masked_fill(held_M, 0)
        shrunk = operator(free_M[None], k, strength.lam, **keywords, **costs)
        # Protected groups were passed as empty groups so that they use no budget. They are kept
        # whole here.
        return shrunk.scale[0].masked_fill_(held_M, 1), shrunk.gate[0].masked_fill(held_M, 1)

    @abstractmethod
    def _joint_budget(
        self, score_M: Tensor, held_M: Tensor, progress: float
    ) -> tuple[float, dict[str, Tensor]]:
        """Return the joint budget of the groups outside the floors, and their costs if any."""


class GlobalAllocation(_NetworkAllocation):
    """A budget in groups of the whole network.

    Raises:
        UserError: the floors alone exceed the budget.
    """

    def __init__(self, partition: GroupPartition, sparsity: float, floor: float = 0.05) -> None:
        refuse_impossible_sparsity(partition.sizes, sparsity, floor)
        super().__init__(partition, sparsity, floor)

    def select(self, score_M: Tensor, progress: float = 1.0) -> Tensor:
        """Return a mask [M] of the network's groups of highest score, floors first."""
        boosted_M = torch.where(self._strongest(score_M), torch.inf, score_M)
        return _ranks(boosted_M[None])[0] < self.k(progress)

    def constraint_rows(self, values_M: Tensor) -> Tensor:
        """Return the values as a single row."""
        return values_M[None]

    def from_constraint_rows(self, values_LN: Tensor) -> Tensor:
        """Return a single row as [M]."""
        return values_LN[0]

    def k_rows(self, progress: float) -> Tensor:
        """Return the number of groups of the network as a tensor of one element."""
        return torch.tensor([float(self.k(progress))], device=self._partition.device)

    def _joint_budget(
        self, score_M: Tensor, held_M: Tensor, progress: float
    ) -> tuple[float, dict[str, Tensor]]:
        return float(self.k(progress) - self._protected), {}


class CostAllocation(_NetworkAllocation):
    """A budget in the cost of the whole network: multiply-adds, bytes or seconds.

    Raises:
        UserError: the floors alone exceed the budget.
    """

    def __init__(
        self, partition: GroupPartition, sparsity: float, costs: GroupCosts, floor: float = 0.05
    ) -> None:
        super().__init__(partition, sparsity, floor)
        self._costs = costs
        least = costs.least(self._floors.tolist()) / costs.dense()
        if least > 1 - sparsity:
            raise UserError(
                f"a sparsity of {sparsity:g} leaves {1 - sparsity:.3g} of all {costs.unit}, less "
                f"than the floors of all layers together ({least:.3g}): lower the sparsity or "
                f"floor={floor:g}"
            )

    def state(self) -> dict[str, Tensor]:
        """Return the costs of the weights, which are seconds measured once."""
        return {"costs": self._costs.amount_Y}

    def _floors_of(self, partition: GroupPartition, floor: float) -> list[int]:
        """Return the minimum number of groups that each family keeps; 0 for residual blocks."""
        # Without its blocks a network still works, and blocks differ in cost: the strongest one
        # alone may exceed the budget.
        floors = super()._floors_of(partition, floor)
        pairs = zip(partition.families, floors, strict=True)
        return [0 if family.kind == "depth" else count for family, count in pairs]

    def used(self, kept_M: Tensor) -> dict[str, str | float]:
        """Return the cost of the dense network and of one that keeps these groups."""
        columns_M, size_C = self._costs.column_M, self._costs.size_C
        kept_C = torch.zeros_like(size_C).index_add_(0, columns_M, kept_M.cpu().to(size_C))
        kept = float(self._costs.total(kept_C[None]))
        return {"unit": self._costs.unit, "dense": self._costs.dense(), "kept": kept}

    def select(self, score_M: Tensor, progress: float = 1.0) -> Tensor:
        """Return a mask [M] of the longest prefix of a ranking whose true cost is in budget."""
        # The relaxed budget sum c u = K admits groups in order of score / sqrt(cost) (specification
        # 1.3). The cost of each prefix is exact, since it depends only on counts per column.
        worth_M = score_M / self._group_costs().sqrt()
        worth_M = torch.where(self._strongest(score_M), torch.inf, worth_M)
        order_M = worth_M.argsort(stable=True, descending=True)
        column_M = self._costs.column_M[order_M.cpu()]
        columns = len(self._costs.size_C)
        admitted_MC = torch.nn.functional.one_hot(column_M, columns).cumsum(0)
        budget = (1 - self._sparsity * cubic_sparsity(progress)) * self._costs.dense()
        # The cost grows with the prefix, so the number of prefixes that fit is the length of the
        # longest one.
        fits_M = self._costs.total(admitted_MC) <= budget
        count = max(self._protected, int(fits_M.sum()))
        kept_M = torch.zeros_like(score_M, dtype=torch.bool)
        kept_M[order_M[:count]] = True
        return kept_M

    def constraint_rows(self, values_M: Tensor) -> Tensor:
        """Refuse: a cost fixes no number of groups."""
        raise self._no_counts()

    def from_constraint_rows(self, values_LN: Tensor) -> Tensor:
        """Refuse: a cost fixes no number of groups."""
        raise self._no_counts()

    def k_rows(self, progress: float) -> Tensor:
        """Refuse: a cost fixes no number of groups."""
        raise self._no_counts()

    def _no_counts(self) -> UserError:
        return UserError(
            f"unit={self._costs.unit} fixes a cost and not the number of groups that this solver "
            "needs: use unit=groups"
        )

    def _joint_budget(
        self, score_M: Tensor, held_M: Tensor, progress: float
    ) -> tuple[float, dict[str, Tensor]]:
        cost_M = self._group_costs()
        # The operators need a linear budget, but the true cost is bilinear and not a sum over
        # groups. The linear cost of a selection that meets the true budget is used instead.
        afforded_M = self.select(score_M, progress) & ~held_M
        return float((cost_M * afforded_M).sum()), {"cost_LM": cost_M[None]}

    def _group_costs(self) -> Tensor:
        return self._costs.per_group()[self._costs.column_M].to(self._partition.device)


def refuse_impossible_sparsity(sizes: Sequence[int], sparsity: float, floor: float) -> None:
    """Raise if the floors of families of these sizes exceed what a network may keep."""
    k, floors = _kept_count(sum(sizes), sparsity), sum(_floor_counts(sizes, floor))
    if floors > k:
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
    rank_LN = torch.arange(score_LN.shape[-1], device=score_LN.device).expand_as(order_LN)
    return torch.empty_like(order_LN).scatter_(-1, order_LN, rank_LN)
