"""Removal of selected micro-experts from one block, and its report.

Shapes: N micro-experts of a layer, E routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from bench.models.anatomy import MoEBlock
from methods.camera.analysis import BlockEnergies
from methods.camera.refit import Grams, refit
from methods.micro_experts import SHARED, census, per_expert, remove, spans, zero

State = Literal["zeroed", "removed"]
QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)


@dataclass(frozen=True)
class Surgery:
    """How micro-experts are removed: resulting state, alignment of widths, damping of the refit."""

    state: State
    align: int
    damping: float

    def perform(self, found: BlockEnergies, energy_N: Tensor, indices: Tensor) -> dict[str, Any]:
        """Refit and prune one block; return its report entry."""
        block = found.block
        # Before the change: energies and widths describe the block as it was.
        report = _report(found, energy_N, indices)
        if isinstance(found.beside, Grams):
            # Refit before removal, while channels still have their original indices.
            report |= {"refit": refit(found.beside, dict(per_expert(block, indices)), self.damping)}
        if self.state == "zeroed":
            zero(block, indices)
        elif len(indices):
            report |= {"padding_micro_experts": remove(block, indices, self.align)}
        return report


def _report(found: BlockEnergies, energy_N: Tensor, indices: Tensor) -> dict[str, Any]:
    """Build a block's report entry before it changes."""
    block = found.block
    counted = census(block, indices)
    widths, lost = counted["width_per_expert"], counted["removed_per_expert"]
    experts = [expert for expert, _ in spans(block)]
    total = float(energy_N.sum())
    return {
        "layer": block.layer,
        "name": block.name,
        "removed": len(indices),
        "micro_experts": block.micro_experts,
        "removed_energy_share": float(energy_N[indices].sum()) / total if total else 0.0,
        **counted,
        "energy_per_expert": [float(energy_N[place].sum()) for _, place in spans(block)],
        "emptied_experts": sum(n == width > 0 for n, width in zip(lost, widths, strict=True)),
        "kept_work": _kept_work(block, found.visits, dict(zip(experts, lost, strict=True))),
        "energy_quantiles": _quantiles(energy_N),
    }


def _kept_work(block: MoEBlock, visits: list[int], lost: dict[int, int]) -> float:
    """Return the fraction of routed multiply-adds that remain, at the calibration text's routing.

    Experts that are selected often tend to lose less, so more work than weights remains.
    """
    before = sum(n * width for n, width in zip(visits, block.widths, strict=True))
    # Only routed experts: shared ones run on every token whatever the routing.
    gone = sum(visits[expert] * count for expert, count in lost.items() if expert != SHARED)
    return 1 - gone / before if before else 1.0


def _quantiles(energy_N: Tensor) -> dict[str, float]:
    """Return quantiles by nearest rank."""
    # torch.quantile accepts at most 2^24 values.
    ordered = energy_N.sort().values.tolist()
    return {str(q): ordered[round(q * (len(ordered) - 1))] for q in QUANTILES}
