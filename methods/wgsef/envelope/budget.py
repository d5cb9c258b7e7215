"""The scalar equation behind every form of the envelope.

Shapes: L rows (layers, or one row for a whole network), M groups in a row, 1 where all are alike.

Each row has one unknown, the multiplier eta > 0 (dimensionless):

    G(eta) = sum_j c_j clip(eta p_j - q_j, 0, 1) = k

with slopes p_j >= 0, offsets q_j >= 0, costs c_j > 0 and the budget k > 0. Value, proximal
operator, debiased operator and cost budget of the WGSEF (arXiv 2212.12921) differ in p and q only
(derived; checked against certificates in the tests). G is piecewise linear and non-decreasing. A
group of slope zero is never kept, so ragged rows are padded with zeros. Where all other groups fit
into the budget the root is infinite and each of them is kept whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1 << 15


@dataclass(frozen=True)
class Budget:
    """One equation a row: slopes p [L, M], offsets q [L, M or 1], budget k [L], costs c [L, M].

    All are of one floating dtype, fp64 or fp32; `cost` None counts every group as one.
    """

    slope: Tensor
    offset: Tensor
    budget: Tensor
    cost: Tensor | None = None

    def gates(self, eta_L: Tensor, guard: float | None = None) -> Tensor:
        """Return u_LM = clip(eta p - q, 0, 1), with what is at most `guard` set to exactly zero.

        A root on the edge of a flat piece of G leaves rounding noise of 1e-16 in groups that must
        be zero; `guard` (1e-9 in fp64, 1e-5 in fp32 unless given) removes it.
        """
        if guard is None:
            guard = 1e-9 if self.slope.dtype == torch.float64 else 1e-5
        # An infinite multiplier would make nan of an empty group's zero slope.
        largest = torch.finfo(eta_L.dtype).max ** 0.5
        raised_LM = self.slope * eta_L.clamp(max=largest)[:, None]
        gate_LM: Tensor = raised_LM.sub_(self.offset).clamp_(0, 1)
        return torch.threshold_(gate_LM, guard, 0.0)

    def fits(self) -> Tensor:
        """Return which rows [L] can keep every group that is not empty."""
        # Slopes are not negative, so their signs count the groups that are not empty.
        live = [part._weighted(part.slope.sign()).sum(-1) for part in self._blocks()]
        return torch.stack(live).sum(0, dtype=torch.float64) <= self.budget

    def all_fractional(self) -> Tensor:
        """Return the root [L] of rows in which no group is empty and none is whole."""
        if self.cost is None and self._shared_offset:
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
        # Partial sums are added in fp64, so that ten million fp32 groups are still counted.
        kept_L = torch.stack(kept).sum(0, dtype=torch.float64).to(eta_L)
        return kept_L, torch.stack(rate).sum(0)

    def sample(self, stride: int) -> Budget:
        """Return the equation over every `stride`-th group and the same part of the budget."""
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
        # Where clipping changed nothing, and only there, the group is fractional.
        fractional_LM = raised_LM.eq_(gate_LM)
        rate_L = fractional_LM.mul_(self._weighted(self.slope)).sum(-1)
        return self._weighted(gate_LM).sum(-1), rate_L

    def _blocks(self) -> list[Budget]:
        """Return the equation cut into columns; temporaries of a block stay in a CPU's cache."""
        rows, groups = self.slope.shape
        if self.slope.device.type != "cpu" or rows * groups <= _BLOCK:
            return [self]
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
