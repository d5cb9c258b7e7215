"""The scalar equation behind every form of the envelope.

Shapes: L rows (layers, or one row for a whole network), M groups in a row, 1 if all are equal.

Each row has one unknown, the multiplier eta > 0 (dimensionless):

    G(eta) = sum_j c_j clip(eta p_j - q_j, 0, 1) = k

with slopes p_j >= 0, offsets q_j >= 0, costs c_j > 0 and the budget k > 0. Value, proximal
operator, debiased operator and cost budget of the WGSEF (arXiv 2212.12921) differ only in p and q
(derived; checked against certificates in the tests). G is piecewise linear and non-decreasing. A
group of slope zero is never kept, so ragged rows are padded with zeros. If all non-empty groups fit
into the budget, the root is infinite and each of them is kept whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1 << 15


@dataclass(frozen=True)
class Budget:
    """One equation per row: slopes p [L, M], offsets q [L, M or 1], budget k [L], costs c [L, M].

    All have one floating dtype, fp64 or fp32; `cost` None counts every group as one.
    """

    slope: Tensor
    offset: Tensor
    budget: Tensor
    cost: Tensor | None = None

    def gates(self, eta_L: Tensor, guard: float | None = None) -> Tensor:
        """Return u_LM = clip(eta p - q, 0, 1), with values of at most `guard` set to exactly zero.

        `guard` is 1e-9 in fp64 and 1e-5 in fp32 unless given.
        """
        # At a root on the edge of a flat piece of G, a group that must be zero has eta p = q, and
        # the difference of two equal numbers leaves rounding noise: about 1e-16 in fp64, 1e-7 in
        # fp32, hence the dtype. The noise must go, since u > 0 counts as an alive group. Known
        # limit: the operator scales by u / (u + b) with b = lam d / h, so if b is far below the
        # guard (tiny lam d in fp32), a gate under the guard belongs to a group that should be
        # almost unshrunk, and it is zeroed instead.
        if guard is None:
            guard = 1e-9 if self.slope.dtype == torch.float64 else 1e-5
        # inf * 0 is NaN, so an infinite multiplier would turn empty groups into NaN; the square
        # root of the largest number leaves room for the product with any slope.
        largest = torch.finfo(eta_L.dtype).max ** 0.5
        raised_LM = self.slope * eta_L.clamp(max=largest)[:, None]
        gate_LM: Tensor = raised_LM.sub_(self.offset).clamp_(0, 1)
        return torch.threshold_(gate_LM, guard, 0.0)

    def fits(self) -> Tensor:
        """Return a mask [L] of the rows in which all non-empty groups fit into the budget."""
        # Slopes are not negative, so the sum of their signs counts the non-empty groups.
        live = [part._weighted(part.slope.sign()).sum(-1) for part in self._blocks()]
        return torch.stack(live).sum(0, dtype=torch.float64) <= self.budget

    def all_fractional(self) -> Tensor:
        """Return the root [L], valid for rows in which no group is empty and none is whole."""
        if self.cost is None and self._shared_offset:
            # One offset for all groups needs no [L, M] temporary.
            offset_L = self.offset[:, 0] * self.slope.shape[-1]
            return (self.budget + offset_L) / self.slope.sum(-1)
        slope_L = self._weighted(self.slope).sum(-1)
        offset_L = self._weighted(self.offset.expand_as(self.slope)).sum(-1)
        return (self.budget + offset_L) / slope_L

    def evaluate(self, eta_L: Tensor) -> tuple[Tensor, Tensor]:
        """Return G(eta) and its slope dG/deta, both [L]."""
        parts = [part._evaluate(eta_L) for part in self._blocks()]
        if len(parts) == 1:
            return parts[0]
        kept, rate = zip(*parts, strict=True)
        # Above 2^24 an fp32 sum can no longer count single groups, so partial sums add up in fp64.
        kept_L = torch.stack(kept).sum(0, dtype=torch.float64).to(eta_L)
        return kept_L, torch.stack(rate).sum(0)

    def sample(self, stride: int) -> Budget:
        """Return the equation over every `stride`-th group with the same fraction of the budget."""
        return Budget(
            self.slope[:, ::stride].contiguous(),
            self.offset if self._shared_offset else self.offset[:, ::stride].contiguous(),
            self.budget / stride,
            None if self.cost is None else self.cost[:, ::stride].contiguous(),
        )

    @property
    def _shared_offset(self) -> bool:
        return self.offset.shape[-1] == 1

    def _evaluate(self, eta_L: Tensor) -> tuple[Tensor, Tensor]:
        raised_LM = (self.slope * eta_L[:, None]).sub_(self.offset)
        gate_LM = raised_LM.clamp(0, 1)
        # A group is fractional exactly if clipping left its value unchanged. Comparing in place
        # reuses the buffer; a mask of two comparisons would need three more of [L, M].
        fractional_LM = raised_LM.eq_(gate_LM)
        rate_L = fractional_LM.mul_(self._weighted(self.slope)).sum(-1)
        return self._weighted(gate_LM).sum(-1), rate_L

    def _blocks(self) -> list[Budget]:
        """Return the equation in blocks of columns whose temporaries fit into a CPU's cache."""
        rows, groups = self.slope.shape
        if self.slope.device.type != "cpu" or rows * groups <= _BLOCK:
            return [self]
        # On a GPU blocks would only add kernel launches.
        width = max(1, _BLOCK // rows)
        return [self._columns(start, start + width) for start in range(0, groups, width)]

    def _columns(self, start: int, stop: int) -> Budget:
        return Budget(
            self.slope[:, start:stop],
            self.offset if self._shared_offset else self.offset[:, start:stop],
            self.budget,
            None if self.cost is None else self.cost[:, start:stop],
        )

    def _weighted(self, amount_LM: Tensor) -> Tensor:
        return amount_LM if self.cost is None else amount_LM * self.cost
