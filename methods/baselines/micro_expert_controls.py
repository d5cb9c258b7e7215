"""Controls: rankings by one factor of CAMERA's energy, and random removal.

Shapes: N micro-experts of a layer (shared ones first).

With φ the coefficients and w the down columns of `methods.camera.analysis`, the energy at α = 0 is
‖φ‖₂² · ‖w‖₂²; each factor alone is a control for the other.
"""

from __future__ import annotations

import random

from bench.method import Context, MethodReport
from bench.models.model import Model
from methods.baselines.expert_removal import WholeExpertPruning, select_whole_experts
from methods.moe.calibration import Activations, SequentialPruning, require_finite
from methods.moe.pruning import MicroExpertPruning, refuse_offloaded, require_calibration
from methods.moe.ranking import lowest, magnitudes, random_scores


class Magnitude(MicroExpertPruning):
    """Remove the micro-experts whose down column has the smallest norm ‖w‖₂."""

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Rank within every layer; no calibration."""
        structure = model.structure
        refuse_offloaded(structure.micro_expert_blocks)
        layers = [
            self.remove_micro_experts(block, lowest(magnitudes(block), budget))
            for block, budget in zip(
                structure.micro_expert_blocks, self.budgets(structure), strict=True
            )
        ]
        return self.build_report(model, structure, layers)


class ActivationOnly(MicroExpertPruning, SequentialPruning):
    """Remove the micro-experts of least ‖φ‖₂², regardless of their down column."""

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Measure and rank within every layer."""
        calibration = require_calibration(context)
        structure = model.structure
        refuse_offloaded(structure.micro_expert_blocks)
        layers = []
        observed = self.observe_blocks(model, calibration.tokens, Activations, context.progress)
        for (block, observer), budget in zip(observed, self.budgets(structure), strict=True):
            score_N = observer.square_sum()
            require_finite(block, score_N)
            layers.append(self.remove_micro_experts(block, lowest(score_N, budget)))
        more = {"calibration": calibration.fingerprint, "tokens": calibration.tokens.numel()}
        return self.build_report(model, structure, layers, **more)


class RandomExperts(WholeExpertPruning):
    """Remove routed experts at random in every layer; shared experts stay."""

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Remove random experts; the report lists them."""
        structure = model.structure
        refuse_offloaded(structure.moe)
        layers = []
        for block, budget in zip(structure.moe, self.budgets(structure), strict=True):
            # Seeded by name, so that the draw of a block does not depend on the other blocks.
            # `:order` makes it independent of the draw of the block's partial expert.
            rng = random.Random(f"{context.seed}:{block.name}:order")
            order = rng.sample(range(block.num_experts), block.num_experts)
            chosen = select_whole_experts(block.widths, order, budget)
            layers.append(self.remove_experts(block, chosen, structure, context.seed))
        return self.build_report(model, structure, layers)


class RandomMicroExperts(MicroExpertPruning):
    """Remove random micro-experts, shared and routed pooled: CAMERA-P with a random ranking."""

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Remove random micro-experts; the report counts them per expert."""
        structure = model.structure
        refuse_offloaded(structure.micro_expert_blocks)
        layers = []
        for block, budget in zip(
            structure.micro_expert_blocks, self.budgets(structure), strict=True
        ):
            score_N = random_scores(block, context.seed)
            layers.append(self.remove_micro_experts(block, lowest(score_N, budget)))
        return self.build_report(model, structure, layers)
