"""WGSEF without training: the micro-experts of each MoE layer that best reconstruct its output.

Shapes: T tokens, F an expert's width, D d_model, N micro-experts of a layer (shared ones first).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from bench.method import Context, InputSize, MethodReport, MethodWork
from bench.models.model import Model
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import MoEBlock
from methods.moe.calibration import SequentialPruning, require_finite
from methods.moe.least_squares import ExpertGrams, refit_experts, refit_flops
from methods.moe.micro_experts import channels_per_expert, expert_spans, expert_view
from methods.moe.pruning import (
    LayerEntry,
    MicroExpertPruning,
    refuse_offloaded,
    require_calibration,
)
from methods.moe.ranking import apportion
from methods.wgsef.layerwise import reconstruction
from methods.wgsef.layerwise.reconstruction import (
    DROP_OPERATORS,
    Reconstruction,
    selection_flops,
)

SELECTORS: dict[str, reconstruction.Selector] = {
    "debiased": reconstruction.select_by_homotopy,
    "greedy": reconstruction.select_by_elimination,
    "energy": reconstruction.select_by_energy,
}


class WgsefLayerwise(MicroExpertPruning, SequentialPruning):
    """Keep the micro-experts that best reconstruct the outputs of their experts.

    Atoms are micro-experts, with the routing weight included in their activations. The Gram matrix
    of each expert is measured in one pass over calibration text. Of the values of `selector`,
    `debiased` follows the homotopy of the debiased WGSEF, `greedy` is backward elimination, and
    `energy` keeps the largest RMS(phi) ||w||. With `scope=layer` all experts of a layer compete,
    with `expert` each loses the same fraction. `refit` fits the remaining down columns by least
    squares; without it they are unchanged, so that selectors can be compared on their own. `ratio`
    and `base` are as in camera_p.
    """

    selector: Literal["debiased", "greedy", "energy"] = "debiased"
    scope: Literal["layer", "expert"] = "layer"
    refit: bool = True
    refit_damping: float = Field(default=1e-4, gt=0)

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Add the Gram matrices in float64, which counts twice, the selections and the refits."""
        walk, flops, dropped = super().work(structure, inputs), 0.0, 0
        blocks = structure.micro_expert_blocks
        for block, budget in zip(blocks, self.budgets(structure), strict=True):
            # Widths of experts, and the share of the tokens that reach each.
            parts = [(width, block.top_k / block.num_experts) for width in block.widths]
            parts += [(block.d_shared, 1.0)] if block.d_shared else []
            for width, share in parts:
                gone = round(budget * width / block.micro_experts)
                flops += 4 * inputs.tokens * share * width**2
                flops += selection_flops(self.selector, width, block.d_model, gone)
                flops += refit_flops(width, width - gone, block.d_model) if self.refit else 0.0
            dropped += budget
        held = 8.0 * max(sum(w**2 for w in b.widths) + b.d_shared**2 for b in blocks)
        return replace(
            walk,
            flops=flops,
            operators=float(DROP_OPERATORS * dropped * (self.selector == "greedy")),
            memory=4 * held,
        )

    @torch.no_grad()
    def apply(self, model: Model, context: Context) -> MethodReport:
        """Measure, select, refit and remove, layer by layer."""
        calibration = require_calibration(context)
        structure = model.structure
        refuse_offloaded(structure.micro_expert_blocks)
        tokens = calibration.tokens.numel()
        layers = []
        observed = self.observe_blocks(model, calibration.tokens, ExpertGrams, context.progress)
        for (block, grams), budget in zip(observed, self.budgets(structure), strict=True):
            require_finite(block, *(gram.total for gram in grams.grams.values()))
            layers.append(self._prune(block, grams, tokens, budget))
        more = {"calibration": calibration.fingerprint, "tokens": tokens}
        return self.build_report(model, structure, layers, **more)

    def _prune(self, block: MoEBlock, grams: ExpertGrams, tokens: int, budget: int) -> LayerEntry:
        """Prune one block; the report lists what each expert keeps, shared ones first."""
        problems = [
            # Divided by all tokens, not by those routed to the expert: errors of different experts
            # are then in the same unit, and a rarely used expert has little weight.
            Reconstruction.from_gram(
                grams.grams[expert].total / tokens, expert_view(block, expert).down.T
            )
            for expert, _ in expert_spans(block)
        ]
        kept = self._select(problems, budget)
        removed = (~torch.cat(kept)).nonzero().flatten()
        report: LayerEntry = {"kept_per_expert": [int(mask.sum()) for mask in kept]}
        if self.refit and len(removed):
            report["refit"] = refit_experts(
                grams, dict(channels_per_expert(block, removed)), self.refit_damping
            )
        return self.remove_micro_experts(block, removed) | report

    def _select(self, problems: list[Reconstruction], budget: int) -> list[Tensor]:
        """Return masks of the kept atoms, one per expert."""
        select = SELECTORS[self.selector]
        sizes = [problem.atoms for problem in problems]
        if self.scope == "layer":
            return select(problems, sum(sizes) - budget)
        masks = []
        losses = apportion(sizes, budget)
        for problem, size, loss in zip(problems, sizes, losses, strict=True):
            masks += select([problem], size - loss)
        return masks
