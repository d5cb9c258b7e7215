"""The NAEE baseline: drop the experts whose absence causes the least error in their block."""

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
    """Drop the routed experts whose removal changes the output of each block least.

    As published every subset is tried; where there are more than `exhaustive_limit`, greedy
    elimination is used and the report says so. `progressive` searches later layers on the outputs
    of the pruned earlier ones, against the unpruned model's output. The search uses about `tokens`
    calibration tokens, evenly spaced in all rows (the paper uses all); errors are summed over rows.
    With `form=zeroed` the search also assumes zeroed experts: tokens are not rerouted.
    """

    uses_calibration: ClassVar[bool] = True

    form: Form = "dropped"
    progressive: bool = True
    exhaustive_limit: int = Field(default=20_000, ge=1)
    tokens: int = Field(default=2048, ge=1)
    batch: int = Field(default=8, ge=1)

    def check(self, anatomy: Anatomy) -> None:
        """Also refuse experts of different widths: subsets would differ in size."""
        super().check(anatomy)
        for block in anatomy.moe:
            if len(set(block.widths)) > 1:
                raise UserError(
                    f"the experts of {block.name} have different widths, but NAEE needs equal "
                    "ones: apply it to the unpruned model"
                )

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Search and drop, block by block; the report says how each block was searched."""
        calibration = calibration_of(context)
        anatomy = model.anatomy
        refuse_offloaded(anatomy.moe)
        rows, length = calibration.tokens.shape
        # At least one token per row: every row is a term of the error.
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
        """Return what a block loses. A partial expert is the one that would be dropped next."""
        count, rest = divmod(budget, block.d_ff)
        found = search(block.num_experts, count, evidence.error, self.exhaustive_limit)
        further = None
        if rest:
            further, _ = next_to_go(block.num_experts, found.dropped, evidence.error)
        report = {"search": found.how, "subsets_tried": found.tried, "error": found.error}
        return Cut(found.dropped, further, rest), report
