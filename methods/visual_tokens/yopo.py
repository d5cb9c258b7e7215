"""The paper's configurations (arXiv 2410.06169) as one method: all four strategies."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from bench.errors import UserError
from bench.method import Context, InputSize, MethodWork
from bench.models.model import Model
from bench.models.structure.model_structure import ModelStructure
from methods.visual_engine.decoder import VisualEngine
from methods.visual_engine.settings import DroppedHeads
from methods.visual_engine.strategy import VisualStrategy
from methods.visual_tokens.allocation import Ranking
from methods.visual_tokens.calibration import (
    calibration_stats_for,
    require_samples,
    with_calibration,
)
from methods.visual_tokens.head_pruning import HeadPruning
from methods.visual_tokens.repair import repair_projections, with_repair
from methods.visual_tokens.search import BudgetSearch, with_search
from methods.visual_tokens.strategies import LayerDrop, NeighborAttention, SparseFFN


class PaperRow(BaseModel):
    """One row of the paper's table: the shares that are kept, and the paper's label for the row.

    `window=0` means no window. `heads` is a share of the heads of all layers, as in the release.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str
    heads: float = Field(ge=0, le=1)
    layers: float = Field(gt=0, le=1)
    neurons: float = Field(gt=0, le=1)
    window: int = Field(default=5, ge=0)


class Yopo(VisualStrategy):
    """Apply the four strategies together.

    `models` has the rows of architectures that are in the paper, `shares` the row of all others.

    With `budget`, layers, heads and neurons are searched for instead, and only the window is taken
    from the row. The budget is a share of the visual FLOPs of the unchanged network (linear in
    heads, unlike the paper's labels) or, with `budget_of=seconds`, of the dense prefill's time,
    measured on this machine.

    With `repair`, which is not part of the paper, output and down projections of visual rows are
    refitted by least squares on the calibration images; `refit_damping` is relative to the mean of
    the Gram matrix's diagonal. The remaining fields are those of the four strategies.
    """

    shares: PaperRow
    models: dict[str, PaperRow] = Field(default_factory=dict)
    budget: float | None = Field(default=None, gt=0, le=1)
    budget_of: Literal["flops", "seconds"] = "flops"
    whole_layers: int = Field(default=2, ge=0)
    heads: Ranking = "scored"
    neurons: Ranking = "scored"
    dropped_heads: DroppedHeads = "zero"
    reorder: bool = True
    calibration_folder: str | None = None
    repair: bool = False
    refit_damping: float = Field(default=0.01, gt=0)

    @property
    def uses_prompts(self) -> bool:
        """Whether a budget, a repair or scores without a saved calibration need prompts."""
        scored = self.calibration_folder is None and "scored" in (self.heads, self.neurons)
        return scored or self.repair or self.budget is not None

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Add the calibration, a search for a budget, and a repair."""
        work = super().work(structure, inputs)
        scored = "scored" in (self.heads, self.neurons) or self.budget is not None
        if scored and self.calibration_folder is None:
            work = with_calibration(work, structure, inputs)
        if self.budget is not None:
            work = with_search(work, inputs, timed=self.budget_of == "seconds")
        if self.repair:
            row = self.models.get(structure.model_type, self.shares)
            cut = 1.0 if self.budget is not None else row.layers
            kept = (1.0, 1.0) if self.budget is not None else (row.heads, row.neurons)
            work = with_repair(work, structure, inputs, cut, *kept)
        return work

    def configure(self, engine: VisualEngine, model: Model, context: Context) -> dict[str, object]:
        """Set all four strategies in the plan, from the paper's row or from a search."""
        row = self.models.get(model.structure.model_type, self.shares)
        if row.window:
            window = NeighborAttention(window=row.window, execution=self.execution)
            window.configure(engine, model, context)
        if self.budget is not None:
            details = self._search(engine, context)
        else:
            details = dict[str, object]()
            for name, part in self._parts(row).items():
                details[name] = part.configure(engine, model, context)
        if self.repair:
            if self.execution != "skip" or self.dropped_heads != "zero":
                raise UserError(
                    "repair=true requires execution=skip and dropped_heads=zero, not "
                    f"execution={self.execution} and dropped_heads={self.dropped_heads}"
                )
            samples = require_samples(context)
            details["repair"] = repair_projections(
                engine, samples, self.refit_damping, context.progress
            )
        return {"label": row.label, "row": row.model_dump(), **details}

    def _parts(self, row: PaperRow) -> dict[str, VisualStrategy]:
        """Return the row as separate strategies, without those that keep everything."""
        parts: dict[str, tuple[float, VisualStrategy]] = {
            "layer_drop": (row.layers, LayerDrop(share=row.layers, execution=self.execution)),
            "head_pruning": (
                row.heads,
                HeadPruning(
                    keep=row.heads,
                    whole_layers=self.whole_layers,
                    choose=self.heads,
                    dropped_heads=self.dropped_heads,
                    reorder=self.reorder,
                    calibration_folder=self.calibration_folder,
                    execution=self.execution,
                ),
            ),
            "sparse_ffn": (
                row.neurons,
                SparseFFN(
                    keep=row.neurons,
                    choose=self.neurons,
                    reorder=self.reorder,
                    calibration_folder=self.calibration_folder,
                    execution=self.execution,
                ),
            ),
        }
        return {name: part for name, (share, part) in parts.items() if share < 1}

    def _search(self, engine: VisualEngine, context: Context) -> dict[str, object]:
        """Find and set layers, heads and neurons that meet the budget."""
        if self.execution != "skip" or self.budget is None:
            raise UserError(
                f"budget is not supported with execution={self.execution}: set execution=skip"
            )
        engine.plan.dropped_heads = self.dropped_heads
        stats = calibration_stats_for(self.calibration_folder, engine, context)
        search = BudgetSearch(engine, stats, require_samples(context), self.whole_layers)
        fit = search.fit_seconds if self.budget_of == "seconds" else search.fit
        fitted = fit(self.budget, context.progress)
        if self.reorder:
            engine.weight_cache.reorder()
        chosen = fitted.settings
        return {
            "budget": self.budget,
            "budget_of": self.budget_of,
            "visual_share": fitted.share,
            "seconds_share": fitted.seconds,
            "layers": chosen.cut,
            "heads": chosen.heads,
            "neurons": chosen.neurons,
            "expected_kl": fitted.expected_kl,
            "calibration": stats.origin,
        }
