"""Random controls: remove as much as CAMERA-P, chosen at random, without calibration."""

from __future__ import annotations

import random

import torch

from bench.method import Context, MethodReport
from bench.models.model import Model
from methods.baselines.whole_experts import WholeExperts, cut
from methods.camera.ranking import lowest
from methods.micro_pruning import MicroPruning
from methods.moe_pruning import refuse_offloaded


class RandomExperts(WholeExperts):
    """Remove routed experts at random in every layer; shared experts stay."""

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Remove random experts; the report lists them."""
        anatomy = model.anatomy
        refuse_offloaded(anatomy.moe)
        layers = []
        for block, budget in zip(anatomy.moe, self.budgets(anatomy), strict=True):
            # Seeded per block by name, so that a block's draw does not depend on which other blocks
            # there are. `:order` keeps it apart from the draw of the partial expert in the block.
            rng = random.Random(f"{context.seed}:{block.name}:order")
            order = rng.sample(range(block.num_experts), block.num_experts)
            chosen = cut(block.widths, order, budget)
            layers.append(self.carry_out(block, chosen, anatomy, context.seed))
        return self.report(model, anatomy, layers)


class RandomMicroExperts(MicroPruning):
    """Remove random micro-experts, shared and routed pooled: CAMERA-P with a random ranking."""

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Remove random micro-experts; the report counts them per expert."""
        anatomy = model.anatomy
        refuse_offloaded(anatomy.moe)
        layers = []
        for block, budget in zip(anatomy.moe, self.budgets(anatomy), strict=True):
            # Seeded per block by name, so that a block's draw does not depend on which other blocks
            # there are.
            rng = random.Random(f"{context.seed}:{block.name}")
            score_N = torch.tensor([rng.random() for _ in range(block.micro_experts)])
            layers.append(self.take_out(block, lowest(score_N, budget)))
        return self.conclude(model, anatomy, layers)
