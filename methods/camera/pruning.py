"""CAMERA-P: measure the energies of micro-experts, rank them, remove the lowest.

Shapes: N micro-experts of a layer, E routed experts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from bench.method import Context, MethodReport
from bench.models.expert_hooks import RouterWeights
from bench.models.model import Model
from bench.models.offload import onloaded
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import MoEBlock
from bench.ui import Progress
from methods.camera.allocation import allocate_least_error
from methods.camera.analysis import Alpha, BlockEnergies, resolve_alpha
from methods.moe.calibration import SequentialPruning, WalkOptions, walk_blocks
from methods.moe.least_squares import ExpertGrams, refit_experts
from methods.moe.micro_experts import (
    SHARED,
    channels_per_expert,
    expert_spans,
    per_expert_counts,
)
from methods.moe.pruning import LayerEntry, MicroExpertPruning, refuse_packed, require_calibration
from methods.moe.ranking import (
    aligned_losses,
    energy_share,
    lowest,
    lowest_of_each,
    lowest_overall,
    lowest_per_expert,
)

# Avoids 0 / 0 for a block whose output is zero; below the power of any other float32 output.
MIN_OUTPUT_POWER = 1e-300


class CameraP(MicroExpertPruning, SequentialPruning):
    """Prune the micro-experts of least energy.

    `alpha` weighs the peak term ‖φ‖∞² against the sum ‖φ‖₂²: a number, or the name of one of the
    values that the authors may have used (`methods.camera.analysis`). φ includes the router weight
    that the model applies. `router_weights=renormalised` instead scales the weights of a token's
    experts to sum to one for every model, as the official code does; together with `alpha=official`
    it gives the official scores.

    `scope` ranks micro-experts within a `layer` (the paper: shared and routed experts pooled),
    within every `expert`, or over the whole model (`global`, not in the paper: energies relative to
    the output power of their block). With `scope=expert`, `aligned` gives all experts the same
    width, the multiple of `align` nearest to the ratio, which inference engines serve without
    padding; the report states the ratio achieved. `sequential` prunes each layer before the next
    one is measured (the official order). `normalised` replaces the sum over tokens by the mean.

    `state` is `zeroed`, as in the paper, or `removed`, which computes the same function without
    storing the weights. The remaining width of an expert is then padded to a multiple of `align`: 8
    is the smallest that grouped GPU kernels accept, 64 gives them fewer and larger products, and on
    a CPU it does not matter.

    Not in the paper, and off by default: `refit` fits the kept down columns by least squares, and
    `allocation=least_error` divides the budget among the layers by predicted error, measured in a
    separate pass before pruning, with at most the fraction `layer_limit` removed from any layer.
    """

    alpha: Alpha = "paper"
    scope: Literal["layer", "expert", "global"] = "layer"
    normalised: bool = False
    router_weights: RouterWeights = "applied"
    state: Literal["zeroed", "removed"] = "removed"
    align: int = Field(default=8, ge=1)
    aligned: bool = False
    refit: bool = False
    refit_damping: float = Field(default=1e-4, gt=0)
    allocation: Literal["uniform", "least_error"] = "uniform"
    layer_limit: float = Field(default=0.9, gt=0, le=1)

    @model_validator(mode="after")
    def _check_aligned(self) -> Self:
        if self.aligned and self.scope != "expert":
            raise ValueError("aligned=true needs the same width in every expert: set scope=expert")
        if self.aligned and self.allocation != "uniform":
            raise ValueError("aligned=true leaves no budget to allocate: set allocation=uniform")
        return self

    @model_validator(mode="after")
    def _check_global_scope(self) -> Self:
        if self.scope != "global":
            return self
        if self.sequential:
            raise ValueError("scope=global ranks all layers at once: set sequential=false")
        if self.refit:
            raise ValueError(
                "refit works layer by layer and does not support scope=global: set refit=false"
            )
        if self.allocation != "uniform":
            raise ValueError(
                "scope=global divides the budget among layers itself: set allocation=uniform"
            )
        return self

    def budgets(self, structure: ModelStructure) -> list[int]:
        """Return how many micro-experts to remove per block; if `aligned`, whole multiples."""
        if not self.aligned:
            return super().budgets(structure)
        share = self.share(structure)
        return [sum(aligned_losses(b, share, self.align)) for b in self.blocks(structure)]

    def walk_options(self, *, sequential: bool = False) -> WalkOptions:
        """Return the options of a walk, with the router weights that enter the energies."""
        options = super().walk_options(sequential=sequential)
        return replace(options, router_weights=self.router_weights)

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Measure, rank and prune; the report holds what was removed from every layer."""
        calibration = require_calibration(context)
        structure = model.structure
        refuse_packed(structure.micro_expert_blocks)
        started = time.perf_counter()
        alpha = resolve_alpha(self.alpha, structure.model_type)
        prune = self._prune_globally if self.scope == "global" else self._prune_by_layer
        # Exhausted before the report is built: the generator prunes as it is consumed.
        layers = list(prune(model, calibration.tokens, alpha, context.progress))
        return self.build_report(
            model,
            structure,
            layers,
            alpha=alpha,
            router_weights=self.router_weights,
            calibration=calibration.fingerprint,
            tokens=calibration.tokens.numel(),
            seconds=time.perf_counter() - started,
        )

    def _prune_by_layer(
        self, model: Model, tokens_BL: Tensor, alpha: float, progress: Progress
    ) -> Iterator[LayerEntry]:
        """Prune every block by its own ranking, as soon as it is measured."""
        budgets, share = self.budgets(model.structure), self.share(model.structure)
        if self.allocation == "least_error":
            # Measured on the unpruned model, with a pass of its own: layer budgets have to be known
            # before the first layer is pruned.
            budgets = self._allocate(model, tokens_BL, progress, sum(budgets))
        measured = self.observe_blocks(model, tokens_BL, self._observer, progress)
        for (block, observer), budget in zip(measured, budgets, strict=True):
            energy_N = observer.energies(alpha, normalised=self.normalised)
            indices = self._lowest(block, energy_N, budget, share)
            yield self._prune_block(observer, energy_N, indices)

    def _prune_globally(
        self, model: Model, tokens_BL: Tensor, alpha: float, progress: Progress
    ) -> Iterator[LayerEntry]:
        """Prune all blocks by one ranking of energies relative to block output power."""
        options = self.walk_options()
        measured = [
            (observer, observer.energies(alpha, normalised=self.normalised))
            for _, observer in walk_blocks(model, tokens_BL, BlockEnergies, options, progress)
        ]
        # Outputs of different blocks differ in scale, so a ranking of raw energies would strip the
        # blocks with small outputs. Divided by Σ_t ‖y_t‖², an energy is the relative squared error
        # of the block's output (at α = 0).
        relative = [
            energy_N / max(observer.output_power, MIN_OUTPUT_POWER)
            for observer, energy_N in measured
        ]
        chosen = lowest_overall(relative, sum(self.budgets(model.structure)))
        for (observer, energy_N), indices in zip(measured, chosen, strict=True):
            # The walk has ended, so an offloaded layer must be loaded onto its device again.
            with onloaded(model.structure.layers[observer.block.layer]):
                yield self._prune_block(observer, energy_N, indices.to(energy_N.device))

    def _allocate(
        self, model: Model, tokens_BL: Tensor, progress: Progress, budget: int
    ) -> list[int]:
        """Divide a budget among the blocks by the errors predicted for the whole model."""
        measured = walk_blocks(model, tokens_BL, BlockEnergies, self.walk_options(), progress)
        relative = [
            # α = 0 whatever the ranking uses: only then is a sum of energies the predicted error.
            observer.energies(0.0, normalised=False) / max(observer.output_power, MIN_OUTPUT_POWER)
            for _, observer in measured
        ]
        return allocate_least_error(relative, budget, self.layer_limit)

    def _observer(self, block: MoEBlock) -> BlockEnergies:
        return BlockEnergies(block, ExpertGrams(block) if self.refit else None)

    def _lowest(self, block: MoEBlock, energy_N: Tensor, budget: int, share: Fraction) -> Tensor:
        """Return the flat indices to remove from one block."""
        if self.scope == "layer":
            return lowest(energy_N, budget)
        # Scope `expert`: `_prune_globally` handles `global`.
        spans = [span for _, span in expert_spans(block)]
        if self.aligned:
            return lowest_of_each(energy_N, spans, aligned_losses(block, share, self.align))
        return lowest_per_expert(energy_N, spans, budget)

    def _prune_block(
        self, observer: BlockEnergies, energy_N: Tensor, indices: Tensor
    ) -> LayerEntry:
        """Refit and prune one block; return its report entry."""
        # Computed before the block changes: energies and widths describe it as it was.
        measured = _measured_entry(observer, energy_N, indices)
        if observer.grams is not None:
            # Refit before removal, while channels still have their original indices.
            removed = dict(channels_per_expert(observer.block, indices))
            measured["refit"] = refit_experts(observer.grams, removed, self.refit_damping)
        return self.remove_micro_experts(observer.block, indices) | measured


QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)


def _measured_entry(observer: BlockEnergies, energy_N: Tensor, indices: Tensor) -> LayerEntry:
    """Build the part of a block's report entry that is measured, before the block changes."""
    block = observer.block
    counted = per_expert_counts(block, indices)
    widths, lost = counted["width_per_expert"], counted["removed_per_expert"]
    experts = [expert for expert, _ in expert_spans(block)]
    lost_by_expert = dict(zip(experts, lost, strict=True))
    return {
        "name": block.name,
        "micro_experts": block.micro_experts,
        "removed_energy_share": energy_share(energy_N, indices),
        "energy_per_expert": [float(energy_N[span].sum()) for _, span in expert_spans(block)],
        "emptied_experts": sum(n == width > 0 for n, width in zip(lost, widths, strict=True)),
        "kept_work": _kept_work(block, observer.tokens_per_expert, lost_by_expert),
        "energy_quantiles": _quantiles(energy_N),
    }


def _kept_work(block: MoEBlock, tokens_per_expert: list[int], lost: dict[int, int]) -> float:
    """Return the fraction of the routed experts' multiply-adds that remain on calibration text.

    Experts that are selected often tend to lose less, so a larger fraction of the work remains than
    of the weights.
    """
    before = sum(n * width for n, width in zip(tokens_per_expert, block.widths, strict=True))
    # Only routed experts: shared ones run on every token whatever the routing.
    removed = sum(
        tokens_per_expert[expert] * count for expert, count in lost.items() if expert != SHARED
    )
    return 1 - removed / before if before else 1.0


def _quantiles(energy_N: Tensor) -> dict[str, float]:
    """Return quantiles by nearest rank."""
    # torch.quantile accepts at most 2^24 values.
    ordered = energy_N.sort().values.tolist()
    return {str(q): ordered[round(q * (len(ordered) - 1))] for q in QUANTILES}
