"""CAMERA-P: method and its surgery on one block.

Removal of selected micro-experts from one block, and its report.

Shapes: N micro-experts of a layer, E routed experts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from bench.data.calibration import Calibration
from bench.method import Context, MethodReport
from bench.models.model import Model
from bench.models.offload import onloaded
from bench.models.structure.moe_block import MoEBlock
from bench.ui import Progress
from methods.camera.allocation import allocate_least_error
from methods.camera.analysis import BlockEnergies, WalkOptions, block_energies
from methods.camera.energy import Alpha, resolve_alpha
from methods.moe.least_squares import ExpertGrams, refit_experts
from methods.moe.micro_experts import (
    SHARED,
    channels_per_expert,
    delete_micro_experts,
    expert_spans,
    invalidate_structure,
    per_expert_counts,
    zero_micro_experts,
)
from methods.moe.pruning import MoEPruning, achieved_ratios, refuse_packed, require_calibration
from methods.moe.ranking import lowest, lowest_overall, lowest_per_expert

# Below the power of any output computed in float32; keeps 0 / 0 out for a block without output.
MIN_OUTPUT_POWER = 1e-300
PrunedState = Literal["zeroed", "removed"]


class CameraP(MoEPruning):
    """Prune micro-experts by energy.

    `alpha` weighs the peak term ‖φ‖∞² against the sum ‖φ‖₂²: a number, or one of two readings of
    what the authors used for this model (`methods.camera.energy`).

    `scope` ranks within a `layer` (the paper: shared and routed experts pooled), within every
    `expert`, or over the whole model (`global`: energies relative to the output power of their
    block; not in the paper). `sequential` prunes a layer before the next is measured (the official
    order). `normalised` replaces the sum over tokens by their mean. `batch` rows pass through a
    layer together, and an expert sees at most `chunk` tokens at a time; neither changes the result.

    `state` says how micro-experts are removed: `zeroed` as in the paper, or `removed`, which
    computes the same function without storing the weights. The remaining width of an expert is
    stored rounded up to a multiple of `align`: 8 is the least that the grouped kernels of a GPU
    accept, 64 gives them fewer and larger products, and on a CPU it does not matter.

    Not in the paper, and off by default: `refit` fits the kept down columns by least squares, and
    `allocation: least_error` divides the budget among layers by predicted error, in a separate pass
    before the layers are pruned; no layer then loses more than `layer_limit`.
    """

    uses_calibration: ClassVar[bool] = True

    alpha: Alpha = "paper"
    scope: Literal["layer", "expert", "global"] = "layer"
    sequential: bool = Field(default=True, validate_default=True)
    normalised: bool = False
    state: PrunedState = "removed"
    align: int = Field(default=8, ge=1)
    refit: bool = False
    refit_damping: float = Field(default=1e-4, gt=0)
    allocation: Literal["uniform", "least_error"] = "uniform"
    layer_limit: float = Field(default=0.9, gt=0, le=1)
    batch: int = Field(default=8, ge=1)
    chunk: int = Field(default=4096, ge=1)

    @field_validator("sequential")
    @classmethod
    def _one_pass_for_global(cls, sequential: bool, others: ValidationInfo) -> bool:
        if sequential and others.data.get("scope") == "global":
            raise ValueError("scope=global ranks all layers at once: set sequential=false")
        return sequential

    @field_validator("refit")
    @classmethod
    def _refit_by_layer(cls, refit: bool, others: ValidationInfo) -> bool:
        if refit and others.data.get("scope") == "global":
            raise ValueError(
                "refit works layer by layer and does not support scope=global: set refit=false"
            )
        return refit

    @field_validator("allocation")
    @classmethod
    def _global_allocates(cls, allocation: str, others: ValidationInfo) -> str:
        if allocation != "uniform" and others.data.get("scope") == "global":
            raise ValueError(
                "scope=global divides the budget among layers itself: set allocation=uniform"
            )
        return allocation

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Measure, rank and prune; the report holds what was removed from every layer."""
        alpha = resolve_alpha(self.alpha, model.structure.model_type)
        # On a copy: this object is the user's config and keeps the name given there.
        return self.model_copy(update={"alpha": alpha})._prune(model, context)

    def _prune(self, model: Model, context: Context) -> MethodReport:
        calibration = require_calibration(context)
        structure = model.structure
        refuse_packed(structure.moe)
        started = time.perf_counter()
        prune = self._globally if self.scope == "global" else self._by_layer
        # Exhausted before the structure is invalidated: the generator prunes as it is consumed.
        layers = list(prune(model, calibration, context.progress))
        invalidate_structure(model)
        removed = [layer["removed"] for layer in layers]
        details = {
            "requested": {"ratio": self.ratio, "base": self.base},
            "alpha": self.alpha,
            **achieved_ratios(structure, removed),
            "padding_micro_experts": sum(layer.get("padding_micro_experts", 0) for layer in layers),
            "calibration": calibration.fingerprint,
            "tokens": calibration.tokens.numel(),
            "seconds": time.perf_counter() - started,
            "layers": layers,
        }
        return MethodReport(self.state if sum(removed) else "none", details)

    @property
    def _alpha(self) -> float:
        """The number resolved by `apply`."""
        assert not isinstance(self.alpha, str)
        return self.alpha

    @property
    def _surgery(self) -> BlockPruner:
        return BlockPruner(self.state, self.align, self.refit_damping)

    def _by_layer(
        self, model: Model, calibration: Calibration, progress: Progress
    ) -> Iterator[dict[str, Any]]:
        """Prune every block by its own ranking, as soon as it is measured."""
        budgets = self.budgets(model.structure)
        if self.allocation == "least_error":
            # Measured on the unpruned model, with a pass of its own: layer budgets have to be known
            # before the first layer is pruned.
            budgets = self._allocated(model, calibration, progress, sum(budgets))
        how = WalkOptions(self.batch, self.chunk, self.sequential)
        measured = block_energies(model, calibration.tokens, how, progress, self._observer)
        for found, budget in zip(measured, budgets, strict=True):
            energy_N = found.energies(self._alpha, normalised=self.normalised)
            yield self._surgery.perform(
                found, energy_N, self._lowest(found.block, energy_N, budget)
            )

    def _globally(
        self, model: Model, calibration: Calibration, progress: Progress
    ) -> Iterator[dict[str, Any]]:
        """Prune all blocks by one ranking of energies relative to block output power."""
        how = WalkOptions(self.batch, self.chunk, sequential=False)
        measured = [
            (found, found.energies(self._alpha, normalised=self.normalised))
            for found in block_energies(model, calibration.tokens, how, progress)
        ]
        # Outputs of different blocks differ in scale, so raw energies are not comparable across
        # blocks: one ranking of them would strip the blocks with small outputs. Divided by Σ_t
        # ‖y_t‖² an energy is the relative squared error of the block's output (at α = 0).
        relative = [
            energy_N / max(found.output_power, MIN_OUTPUT_POWER) for found, energy_N in measured
        ]
        chosen = lowest_overall(relative, sum(self.budgets(model.structure)))
        for (found, energy_N), indices in zip(measured, chosen, strict=True):
            # The walk is over, so the weights of an offloaded layer have left the device again.
            with onloaded(model.structure.layers[found.block.layer]):
                yield self._surgery.perform(found, energy_N, indices.to(energy_N.device))

    def _allocated(
        self, model: Model, calibration: Calibration, progress: Progress, budget: int
    ) -> list[int]:
        """Divide a budget among the blocks by the errors predicted for the whole model."""
        how = WalkOptions(self.batch, self.chunk, sequential=False)
        relative = [
            # α = 0 whatever the ranking uses: only then is a sum of energies the predicted error.
            found.energies(0.0, normalised=False) / max(found.output_power, MIN_OUTPUT_POWER)
            for found in block_energies(model, calibration.tokens, how, progress)
        ]
        return allocate_least_error(relative, budget, self.layer_limit)

    def _observer(self, block: MoEBlock) -> BlockEnergies:
        return BlockEnergies(block, ExpertGrams(block) if self.refit else None)

    def _lowest(self, block: MoEBlock, energy_N: Tensor, budget: int) -> Tensor:
        """Return the flat indices to remove from one block."""
        if self.scope == "layer":
            return lowest(energy_N, budget)
        # Scope `expert`; `global` never comes here.
        return lowest_per_expert(energy_N, [place for _, place in expert_spans(block)], budget)


QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)


@dataclass(frozen=True)
class BlockPruner:
    """How micro-experts are removed: resulting state, alignment of widths, damping of the refit."""

    state: PrunedState
    align: int
    damping: float

    def perform(self, found: BlockEnergies, energy_N: Tensor, indices: Tensor) -> dict[str, Any]:
        """Refit and prune one block; return its report entry."""
        block = found.block
        # Before the change: energies and widths describe the block as it was.
        report = _block_report(found, energy_N, indices)
        if isinstance(found.beside, ExpertGrams):
            # Refit before removal, while channels still have their original indices.
            report |= {
                "refit": refit_experts(
                    found.beside, dict(channels_per_expert(block, indices)), self.damping
                )
            }
        if self.state == "zeroed":
            zero_micro_experts(block, indices)
        elif len(indices):
            report |= {"padding_micro_experts": delete_micro_experts(block, indices, self.align)}
        return report


def _block_report(found: BlockEnergies, energy_N: Tensor, indices: Tensor) -> dict[str, Any]:
    """Build a block's report entry before it changes."""
    block = found.block
    counted = per_expert_counts(block, indices)
    widths, lost = counted["width_per_expert"], counted["removed_per_expert"]
    experts = [expert for expert, _ in expert_spans(block)]
    total = float(energy_N.sum())
    return {
        "layer": block.layer,
        "name": block.name,
        "removed": len(indices),
        "micro_experts": block.micro_experts,
        "removed_energy_share": float(energy_N[indices].sum()) / total if total else 0.0,
        **counted,
        "energy_per_expert": [float(energy_N[place].sum()) for _, place in expert_spans(block)],
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
