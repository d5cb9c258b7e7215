"""Sparse visual projection in the feed-forward (arXiv 2410.06169): few neurons for visual rows."""

from __future__ import annotations

from itertools import chain

from pydantic import Field
from torch import Tensor

from bench.method import Context, InputSize, MethodWork
from bench.models.model import Model
from bench.models.structure.model_structure import ModelStructure
from methods.visual_engine.decoder import VisualEngine
from methods.visual_engine.strategy import VisualStrategy
from methods.visual_tokens.allocation import Ranking, control_scores, top_neurons_of_layers
from methods.visual_tokens.calibration import calibration_stats_for, with_calibration


class SparseFFN(VisualStrategy):
    """Use a share `keep` of each feed-forward's neurons for visual rows; text rows use all.

    `choose=scored` keeps the neurons with the largest mean |activation| on visual rows times the
    norm of their output column, `first` keeps the first ones, as the release does, which relies on
    fine-tuning, and `random` is a control. In a MoE layer every expert keeps that share. `reorder`
    permutes the neurons, without changing the function of the network, so that kept ones need no
    copies.
    """

    keep: float = Field(default=0.25, gt=0, le=1)
    choose: Ranking = "scored"
    reorder: bool = True
    calibration_folder: str | None = None

    @property
    def uses_prompts(self) -> bool:
        """Whether neurons are scored on the run's prompts."""
        return self.choose == "scored" and self.calibration_folder is None

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Add the calibration, if neurons are scored on prompts of this run."""
        work = super().work(structure, inputs)
        return with_calibration(work, structure, inputs) if self.uses_prompts else work

    def configure(self, engine: VisualEngine, model: Model, context: Context) -> dict[str, object]:
        """Choose each feed-forward's neurons, set them in the plan and report their counts."""
        widths = [[unit.width for unit in layer.units()] for layer in engine.decoder.layers]
        scores, origin = self._scores(widths, engine, context)
        kept = top_neurons_of_layers(scores, self.keep)
        engine.plan.keep_neurons(kept)
        if self.reorder and self.execution == "skip":
            engine.weight_cache.reorder()
        counts = [[len(unit) for unit in layer] for layer in kept]
        return {"keep": self.keep, "neurons": counts, "of": widths, "scores": origin}

    def _scores(
        self, widths: list[list[int]], engine: VisualEngine, context: Context
    ) -> tuple[list[list[Tensor]], str]:
        """Return a score for every neuron of every feed-forward, [F] each, and their origin."""
        if self.choose != "scored":
            flat = iter(control_scores(self.choose, list(chain(*widths)), context.seed))
            return [[next(flat) for _ in layer] for layer in widths], self.choose
        stats = calibration_stats_for(self.calibration_folder, engine, context)
        return stats.neurons, stats.origin
