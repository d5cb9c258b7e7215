"""The D2-MoE baseline: replace a block's experts by one base and low-rank differences.

Shapes: B rows, L tokens a row.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from bench.errors import UserError
from bench.method import Context, MethodReport
from bench.models.anatomy import Anatomy, MoEBlock
from bench.models.model import Model
from bench.models.observation import observing
from bench.progress import Progress
from methods.baselines.d2_moe.assembling import Inputs, assemble
from methods.baselines.d2_moe.merging import FisherMean, Matrices
from methods.baselines.d2_moe.ranks import ranks
from methods.baselines.expert_frequency import Frequency
from methods.gradients import backward, differentiable
from methods.micro_experts import restructured
from methods.moe_pruning import MoEPruning, calibration_of, refuse_offloaded
from methods.walking import walk


class D2Moe(MoEPruning):
    """Merge a block's routed experts into a base, keep their differences as low-rank factors.

    Ranks are solved for the budget: a block keeps at most the weights that CAMERA-P leaves it at
    the same ratio, and fewer than one rank's less. Shared experts and routers stay. All
    statistics are the unchanged model's. `damping` is relative to the mean of each Gram diagonal.
    Not done: the published code can also prune the base at run time (`pp_ratio`); here its share
    is zero, so the differences carry all of the compression.
    """

    uses_calibration: ClassVar[bool] = True

    batch: int = Field(default=8, ge=1)
    chunk: int = Field(default=4096, ge=1)
    damping: float = Field(default=1e-4, gt=0)

    def check(self, anatomy: Anatomy) -> None:
        """Refuse, too, experts of unlike shapes and a ratio that not even the base fits."""
        super().check(anatomy)
        for block, budget in zip(anatomy.moe, self.budgets(anatomy), strict=True):
            if len(set(block.widths)) > 1:
                raise UserError(
                    f"the experts of {block.name} have different widths and cannot be merged: "
                    "apply D2-MoE to the model as published"
                )
            if self._ranks(block, budget) is None:
                raise UserError(
                    f"ratio={self.ratio} leaves {block.name} fewer weights than one of its "
                    f"{block.num_experts} experts has, and D2-MoE needs one as its base"
                )

    def _ranks(self, block: MoEBlock, budget: int) -> list[int] | None:
        kept = 3 * block.d_model * (sum(block.widths) - budget)
        return ranks(block.num_experts, block.d_model, block.d_ff, kept)

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Measure, merge and factorise; the report counts the weights that are left."""
        calibration = calibration_of(context)
        anatomy = model.anatomy
        refuse_offloaded(anatomy.moe)
        layers = []
        if any(self.budgets(anatomy)):
            layers = self._compress(model, calibration.tokens, context.progress)
        removed = sum(layer["removed_parameters"] for layer in layers)
        details = {
            "asked": {"ratio": self.ratio, "base": self.base},
            "removed_parameters": removed,
            "ratio_of_moe": removed / anatomy.moe_parameters,
            "ratio_of_total": removed / anatomy.parameters,
            "calibration": calibration.fingerprint,
            "tokens": calibration.tokens.numel(),
            "layers": layers,
        }
        return MethodReport("removed" if removed else "none", details)

    def _compress(self, model: Model, tokens_BL: Tensor, told: Progress) -> list[dict[str, Any]]:
        """Replace every block's experts, all measured on the unchanged model, and report each."""
        bases = self._bases(model, tokens_BL, told)
        seen = walk(
            model, tokens_BL, Inputs, self._watching, self.batch, sequential=False, told=told
        )
        layers = [
            self._replace(block, bases.pop(block), inputs, budget)
            for (block, inputs), budget in zip(seen, self.budgets(model.anatomy), strict=True)
        ]
        restructured(model)
        return layers

    def _watching(self, seen: dict[MoEBlock, Any]) -> AbstractContextManager[None]:
        return observing(seen, self.chunk)

    def _bases(self, model: Model, tokens_BL: Tensor, told: Progress) -> dict[MoEBlock, Matrices]:
        """Return the Fisher-weighted mean of every block, from one backward pass a row."""
        counted = walk(
            model, tokens_BL, Frequency, self._watching, self.batch, sequential=False, told=told
        )
        means = {block: FisherMean(block, seen.scores()) for block, seen in counted}
        weights = [source.weight for mean in means.values() for source in mean.sources]
        with differentiable(model.network, weights), ExitStack() as stack:
            for mean in means.values():
                stack.enter_context(mean.listening())
            for row_1L in told.track(tokens_BL.split(1), "gathering Fisher information"):
                backward(model.network, row_1L)
        return {block: mean.base() for block, mean in means.items()}

    def _replace(
        self, block: MoEBlock, base: Matrices, inputs: Inputs, budget: int
    ) -> dict[str, Any]:
        """Put the shared form in the place of a block's experts and count what it saves."""
        of_each = self._ranks(block, budget)
        if of_each is None or not budget:
            return {"layer": block.layer, "removed_parameters": 0}
        before = _numel(block.experts)
        block.block.experts = assemble(block, base, inputs, of_each, self.damping)
        after = _numel(block.block.experts)
        return {
            "layer": block.layer,
            "ranks": of_each,
            "parameters": after,
            "removed_parameters": before - after,
        }


def _numel(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
