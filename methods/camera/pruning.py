"""CAMERA-P (arXiv 2508.02322): remove the micro-experts of least energy, without training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from bench.data.calibration import Calibration
from bench.method import Context, MethodReport
from bench.models.anatomy import MoEBlock
from bench.models.model import Model
from bench.models.residence import resident
from bench.progress import Progress
from methods.camera.allocation import allocate
from methods.camera.alpha import Alpha, weight_of_peak
from methods.camera.analysis import BlockEnergies, Walk, measure
from methods.camera.ranking import lowest, lowest_overall, lowest_per_expert
from methods.camera.refit import Grams
from methods.camera.surgery import State, Surgery
from methods.micro_experts import restructured, spans
from methods.moe_pruning import MoEPruning, achieved, calibration_of, refuse_packed

# Below the power of any output computed in float32; keeps 0 / 0 out for a block without output.
NOTHING = 1e-300


class CameraP(MoEPruning):
    """Prune micro-experts by energy.

    `alpha` weighs the peak term ‖φ‖∞² against the sum ‖φ‖₂²: a number, or one of two readings of
    what the authors used for this model (`methods.camera.alpha`).

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
    state: State = "removed"
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
        alpha = weight_of_peak(self.alpha, model.anatomy.model_type)
        # On a copy: this object is the user's config and keeps the name given there.
        return self.model_copy(update={"alpha": alpha})._prune(model, context)

    def _prune(self, model: Model, context: Context) -> MethodReport:
        calibration = calibration_of(context)
        anatomy = model.anatomy
        refuse_packed(anatomy.moe)
        started = time.perf_counter()
        prune = self._globally if self.scope == "global" else self._by_layer
        # Exhausted before the structure is invalidated: the generator prunes as it is consumed.
        layers = list(prune(model, calibration, context.progress))
        restructured(model)
        removed = [layer["removed"] for layer in layers]
        details = {
            "asked": {"ratio": self.ratio, "base": self.base},
            "alpha": self.alpha,
            **achieved(anatomy, removed),
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
    def _surgery(self) -> Surgery:
        return Surgery(self.state, self.align, self.refit_damping)

    def _by_layer(
        self, model: Model, calibration: Calibration, progress: Progress
    ) -> Iterator[dict[str, Any]]:
        """Prune every block by its own ranking, as soon as it is measured."""
        budgets = self.budgets(model.anatomy)
        if self.allocation == "least_error":
            # Measured on the unpruned model, with a pass of its own: layer budgets have to be known
            # before the first layer is pruned.
            budgets = self._allocated(model, calibration, progress, sum(budgets))
        how = Walk(self.batch, self.chunk, self.sequential)
        measured = measure(model, calibration.tokens, how, progress, self._observer)
        for found, budget in zip(measured, budgets, strict=True):
            energy_N = found.energies(self._alpha, normalised=self.normalised)
            yield self._surgery.perform(
                found, energy_N, self._lowest(found.block, energy_N, budget)
            )

    def _globally(
        self, model: Model, calibration: Calibration, progress: Progress
    ) -> Iterator[dict[str, Any]]:
        """Prune all blocks by one ranking of energies relative to block output power."""
        how = Walk(self.batch, self.chunk, sequential=False)
        measured = [
            (found, found.energies(self._alpha, normalised=self.normalised))
            for found in measure(model, calibration.tokens, how, progress)
        ]
        # Outputs of different blocks differ in scale, so raw energies are not comparable across
        # blocks: one ranking of them would strip the blocks with small outputs. Divided by Σ_t
        # ‖y_t‖² an energy is the relative squared error of the block's output (at α = 0).
        relative = [energy_N / max(found.output_power, NOTHING) for found, energy_N in measured]
        chosen = lowest_overall(relative, sum(self.budgets(model.anatomy)))
        for (found, energy_N), indices in zip(measured, chosen, strict=True):
            # The walk is over, so the weights of an offloaded layer have left the device again.
            with resident(model.anatomy.layers[found.block.layer]):
                yield self._surgery.perform(found, energy_N, indices.to(energy_N.device))

    def _allocated(
        self, model: Model, calibration: Calibration, progress: Progress, budget: int
    ) -> list[int]:
        """Divide a budget among the blocks by the errors predicted for the whole model."""
        how = Walk(self.batch, self.chunk, sequential=False)
        relative = [
            # α = 0 whatever the ranking uses: only then is a sum of energies the predicted error.
            found.energies(0.0, normalised=False) / max(found.output_power, NOTHING)
            for found in measure(model, calibration.tokens, how, progress)
        ]
        return allocate(relative, budget, self.layer_limit)

    def _observer(self, block: MoEBlock) -> BlockEnergies:
        return BlockEnergies(block, Grams(block) if self.refit else None)

    def _lowest(self, block: MoEBlock, energy_N: Tensor, budget: int) -> Tensor:
        """Return the flat indices to remove from one block."""
        if self.scope == "layer":
            return lowest(energy_N, budget)
        # Scope `expert`; `global` never comes here.
        return lowest_per_expert(energy_N, [place for _, place in spans(block)], budget)
