"""The D2-MoE baseline: replace the experts of a block by one base and low-rank differences.

Shapes: B rows, L tokens per row.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from bench.errors import UserError
from bench.method import (
    Context,
    InputSize,
    MethodReport,
    MethodWork,
    WeightForm,
)
from bench.models.model import Model
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import MoEBlock
from bench.ui import Progress
from methods.baselines.d2_moe.factorization import (
    FisherMean,
    GateUpDown,
    InputMoments,
    assemble_experts,
)
from methods.baselines.expert_scores import ExpertTokenCounts
from methods.moe.calibration import (
    CalibratedPruning,
    backpropagate_loss,
    enable_gradients,
    walk_blocks,
)
from methods.moe.micro_experts import replace_child
from methods.moe.pruning import (
    LayerEntry,
    refuse_offloaded,
    require_calibration,
    require_equal_widths,
    require_usual_experts,
)


class D2Moe(CalibratedPruning):
    """Merge the routed experts of a block into a base plus low-rank differences.

    Ranks follow from the budget: a block keeps at most as many weights as CAMERA-P leaves at the
    same ratio, and less than one rank fewer. Shared experts and routers are unchanged. All
    statistics are those of the unmodified model. `damping` is relative to the mean diagonal of each
    Gram matrix. The published code can also prune the base at run time (`pp_ratio`), which is not
    implemented: all compression comes from the differences.
    """

    accepts: ClassVar[frozenset[WeightForm]] = frozenset({"plain"})

    damping: float = Field(default=1e-4, gt=0)

    @property
    def leaves(self) -> WeightForm:
        """Routed experts become differences from their base."""
        return "shared_base"

    def check(self, structure: ModelStructure) -> None:
        """Also refuse experts of different shapes, and a ratio that leaves no room for a base."""
        super().check(structure)
        require_usual_experts(structure.moe, "D2-MoE")
        require_equal_widths(structure.moe, "D2-MoE")
        for block, budget in zip(structure.moe, self.budgets(structure), strict=True):
            if self._ranks(block, budget) is None:
                raise UserError(
                    f"ratio={self.ratio} leaves {block.name} fewer weights than one of its "
                    f"{block.num_experts} experts has, but D2-MoE needs one as its base: use a "
                    "lower ratio"
                )

    def _ranks(self, block: MoEBlock, budget: int) -> list[int] | None:
        kept = 3 * block.d_model * (sum(block.widths) - budget)
        return solve_ranks(block.num_experts, block.d_model, block.d_ff, kept)

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Return two walks, the Fisher pass, the Gram matrices and the decompositions.

        A thin SVD of an m x n matrix, n the shorter side, takes 14·m·n² + 8·n³ (Golub and Van Loan,
        Matrix Computations, table 8.6.1), in float64, which counts twice.
        """
        flops, held = 0.0, 0.0
        for block in structure.moe:
            sides = ((block.d_ff, block.d_model),) * 2 + ((block.d_model, block.d_ff),)
            for rows, columns in sides:
                long, short = max(rows, columns), min(rows, columns)
                flops += 2 * inputs.tokens * block.top_k * columns**2
                flops += 2 * block.num_experts * (14 * long * short**2 + 8 * short**3)
            # A base and its sum of weights, in float64, are held for every block.
            held += 2 * 8 * 3 * block.d_model * block.d_ff
        walk = super().work(structure, inputs)
        return replace(
            walk, forwards=3.0, logits=1.0, backwards=1.0, flops=flops, memory=walk.memory + held
        )

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Measure, merge and factorize; the report counts the remaining weights."""
        calibration = require_calibration(context)
        structure = model.structure
        refuse_offloaded(structure.moe)
        layers: list[LayerEntry] = []
        if any(self.budgets(structure)):
            layers = self._compress(model, calibration.tokens, context.progress)
        return self.replacement_report(structure, layers, calibration)

    def _compress(self, model: Model, tokens_BL: Tensor, progress: Progress) -> list[LayerEntry]:
        """Replace the experts of every block, all measured on the unmodified model."""
        # Before the walk below, which replaces experts.
        bases = self._bases(model, tokens_BL, progress)
        observed = walk_blocks(model, tokens_BL, InputMoments, self.walk_options(), progress)
        layers = [
            # `pop`, because a base is three float64 matrices that are not needed afterwards.
            self._replace(block, bases.pop(block), inputs, budget)
            for (block, inputs), budget in zip(observed, self.budgets(model.structure), strict=True)
        ]
        model.invalidate_structure()
        return layers

    def _bases(
        self, model: Model, tokens_BL: Tensor, progress: Progress
    ) -> dict[MoEBlock, GateUpDown]:
        """Return the Fisher-weighted mean of every block, from one backward pass per row."""
        counted = walk_blocks(model, tokens_BL, ExpertTokenCounts, self.walk_options(), progress)
        means = {block: FisherMean(block, counts.scores()) for block, counts in counted}
        weights = [source.weight for mean in means.values() for source in mean.sources]
        with enable_gradients(model.network, weights), ExitStack() as stack:
            for mean in means.values():
                stack.enter_context(mean.accumulate_gradients())
            # One row per backward pass, because Fisher information is a mean of squared gradients
            # of single rows.
            for row_1L in progress.track(tokens_BL.split(1), "gathering Fisher information"):
                backpropagate_loss(model.network, row_1L)
        return {block: mean.base() for block, mean in means.items()}

    def _replace(
        self, block: MoEBlock, base: GateUpDown, inputs: InputMoments, budget: int
    ) -> LayerEntry:
        """Replace the experts of one block; return its report entry."""
        ranks = self._ranks(block, budget)
        # Without a budget the block is unchanged, because a base would only add weights.
        if ranks is None or not budget:
            return {"layer": block.layer, "removed_parameters": 0}
        before = _parameter_count(block.experts)
        experts = assemble_experts(block, base, inputs, ranks, self.damping)
        after = _parameter_count(experts)
        replace_child(block.block, block.experts, experts)
        return {
            "layer": block.layer,
            "ranks": ranks,
            "parameters": after,
            "removed_parameters": before - after,
        }


def _parameter_count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def solve_ranks(experts: int, d_model: int, width: int, kept: int) -> list[int] | None:
    """Return the rank of every expert's gate, up and down difference, in this order.

    `kept` weights pay for one base expert, 3 · d_model · width, and for the factors of 3 ·
    `experts` differences at d_model + width per rank. All ranks are equal, except that the first
    ones are one higher to use the remainder, so fewer than d_model + width weights of the budget
    stay unused. None if `kept` does not cover the base.
    """
    for_factors = kept - 3 * d_model * width
    if for_factors < 0:
        return None
    same, more = divmod(for_factors // (d_model + width), 3 * experts)
    return [same + (place < more) for place in range(3 * experts)]
