"""The NAEE baseline: drop whole experts by the error that their absence makes in their block."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from bench.errors import UserError
from bench.method import Context, MethodReport
from bench.models.anatomy import Anatomy, MoEBlock
from bench.models.model import Model
from methods.baselines.naee.evidence import Evidence
from methods.baselines.naee.gathering import gather
from methods.baselines.naee.search import next_to_go, search
from methods.baselines.whole_experts import Cut, Form, WholeExperts
from methods.moe_pruning import calibration_of, refuse_offloaded


class Naee(WholeExperts):
    """Drop the routed experts without which each block's output changes least.

    As published every subset is tried; where there are more than `exhaustive_limit`, greedy
    elimination takes over and the report says so. `progressive` shows later layers the pruned
    earlier ones, the target being the unpruned model's output. The search uses about `tokens`
    calibration tokens, evenly spaced in all rows (the paper's: all of them); errors are summed
    over rows. `form=zeroed` searches, too, for what is then done: no other expert steps in.
    """

    uses_calibration: ClassVar[bool] = True

    form: Form = "dropped"
    progressive: bool = True
    exhaustive_limit: int = Field(default=20_000, ge=1)
    tokens: int = Field(default=2048, ge=1)
    batch: int = Field(default=8, ge=1)

    def check(self, anatomy: Anatomy) -> None:
        """Refuse, too, experts of different sizes: subsets of one size would not compare."""
        super().check(anatomy)
        for block in anatomy.moe:
            if len(set(block.widths)) > 1:
                raise UserError(
                    f"the experts of {block.name} have different widths, and NAEE chooses among "
                    "equal ones: apply it to the model as published"
                )

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Search and drop, block by block; the report says how each was searched."""
        calibration = calibration_of(context)
        anatomy = model.anatomy
        refuse_offloaded(anatomy.moe)
        rows, length = calibration.tokens.shape
        kept = min(length, max(1, self.tokens // rows))
        found = gather(
            model,
            calibration.tokens,
            self.batch,
            self.progressive,
            kept,
            self.form,
            context.progress,
        )
        layers = []
        for (block, evidence), budget in zip(found, self.budgets(anatomy), strict=True):
            chosen, search_report = self._choose(block, evidence, budget)
            layers.append(self.carry_out(block, chosen, anatomy, context.seed) | search_report)
        return self.report(
            model,
            anatomy,
            layers,
            progressive=self.progressive,
            calibration=calibration.fingerprint,
            tokens=rows * kept,
        )

    def _choose(
        self, block: MoEBlock, evidence: Evidence, budget: int
    ) -> tuple[Cut, dict[str, Any]]:
        """Return what a block loses; the rest comes from the expert that would be next to go."""
        count, rest = divmod(budget, block.d_ff)
        found = search(block.num_experts, count, evidence.error, self.exhaustive_limit)
        further = None
        if rest:
            further, _ = next_to_go(block.num_experts, found.dropped, evidence.error)
        report = {"search": found.how, "subsets_tried": found.tried, "error": found.error}
        return Cut(found.dropped, further, rest), report
