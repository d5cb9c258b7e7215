"""WGSEF without training: the micro-experts of each MoE layer that best reconstruct its output.

Shapes: T tokens, F an expert's width, D d_model, N micro-experts of a layer (shared ones first).
"""

from __future__ import annotations

from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bench.method import Context, MethodReport
from bench.models.anatomy import MoEBlock
from bench.models.model import Model
from methods.camera.ranking import apportion
from methods.camera.refit import Grams, refit
from methods.micro_experts import per_expert, spans, view
from methods.micro_pruning import MicroPruning
from methods.moe_pruning import calibration_of, refuse_offloaded
from methods.walking import Walker, refuse_nan
from methods.wgsef.layerwise import joint
from methods.wgsef.layerwise.problem import Reconstruction

SELECTORS: dict[str, joint.Selector] = {
    "debiased": joint.homotopy_path,
    "greedy": joint.elimination,
    "energy": joint.energy,
}


class WgsefLayerwise(MicroPruning, Walker):
    """Select micro-experts by how well those that stay reconstruct the outputs of their experts.

    Atoms are micro-experts, with the routing weight included in their activations; calibration text
    gives each expert's Gram matrix in one pass. `selector`: `debiased` follows the homotopy of the
    debiased WGSEF, `greedy` eliminates backwards, `energy` keeps the largest RMS(phi) ||w||.
    `scope: layer` lets all experts of a layer compete, `expert` removes the same fraction from
    each. `refit` fits the remaining down columns by least squares; without it they are unchanged,
    so that selectors can be compared on their own. `ratio` and `base` have the meaning they have in
    camera_p.
    """

    uses_calibration: ClassVar[bool] = True

    selector: Literal["debiased", "greedy", "energy"] = "debiased"
    scope: Literal["layer", "expert"] = "layer"
    refit: bool = True
    refit_damping: float = Field(default=1e-4, gt=0)

    @torch.no_grad()
    def apply(self, model: Model, context: Context) -> MethodReport:
        """Measure, select, refit and remove, layer by layer."""
        calibration = calibration_of(context)
        anatomy = model.anatomy
        refuse_offloaded(anatomy.moe)
        tokens = calibration.tokens.numel()
        layers = []
        seen = self.watch(model, calibration.tokens, Grams, context.progress)
        for (block, grams), budget in zip(seen, self.budgets(anatomy), strict=True):
            refuse_nan(block, *grams.gram_FF.values())
            layers.append(self._prune(block, grams, tokens, budget))
        more = {"calibration": calibration.fingerprint, "tokens": tokens}
        return self.conclude(model, anatomy, layers, **more)

    def _prune(self, block: MoEBlock, grams: Grams, tokens: int, budget: int) -> dict[str, Any]:
        """Prune one block and report what stays of each expert, shared ones first."""
        problems = [
            # All tokens of the text, not those routed to the expert: errors of different experts
            # are then in one unit, and a rarely used expert weighs little.
            Reconstruction.of(grams.gram_FF[expert] / tokens, view(block, expert).down.T)
            for expert, _ in spans(block)
        ]
        kept = self._selected(problems, budget)
        gone = (~torch.cat(kept)).nonzero().flatten()
        report: dict[str, Any] = {"kept_per_expert": [int(mask.sum()) for mask in kept]}
        if self.refit and len(gone):
            report["refit"] = refit(grams, dict(per_expert(block, gone)), self.refit_damping)
        return self.take_out(block, gone) | report

    def _selected(self, problems: list[Reconstruction], budget: int) -> list[Tensor]:
        """Return masks of the atoms that stay, one per expert."""
        select = SELECTORS[self.selector]
        sizes = [problem.atoms for problem in problems]
        if self.scope == "layer":
            return select(problems, sum(sizes) - budget)
        # `apportion` rounds the shares so that they add up to the budget exactly.
        counts = zip(problems, sizes, apportion(sizes, budget), strict=True)
        return list(chain.from_iterable(select([p], size - gone) for p, size, gone in counts))
