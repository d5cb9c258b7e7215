"""Sparse visual projection in the feed-forward (arXiv 2410.06169): few neurons for visual rows."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from bench.method import Context
from bench.models.model import Model
from methods.visual_engine.decoder import VisualEngine
from methods.visual_engine.strategy import VisualStrategy
from methods.visual_tokens.allocation import top_neurons
from methods.visual_tokens.calibration import calibration_stats_for

KeptNeurons = list[tuple[torch.Tensor, ...]]


class SparseFFN(VisualStrategy):
    """Give visual rows a share `keep` of each feed-forward's neurons; text rows keep them all.

    `choose=scored` keeps the neurons with the largest mean |activation| on visual rows times the
    norm of their output column; `first` the first ones, as the release does, which relies on
    fine-tuning; `random` is a control. In a mixture of experts every expert keeps that share. With
    `reorder` neurons are permuted, exactly, so that kept ones need no copies.
    """

    keep: float = Field(default=0.25, gt=0, le=1)
    choose: Literal["scored", "first", "random"] = "scored"
    reorder: bool = True
    calibration_folder: str | None = None

    @property
    def uses_prompts(self) -> bool:
        """Whether neurons are scored on the run's prompts."""
        return self.choose == "scored" and self.calibration_folder is None

    def configure(self, engine: VisualEngine, model: Model, context: Context) -> dict[str, Any]:
        """Choose each feed-forward's neurons, set them in the plan and report their counts."""
        widths = [[unit.width for unit in layer.units()] for layer in engine.decoder.layers]
        scores, origin = self._scores(widths, engine, context)
        kept: KeptNeurons = [
            tuple(top_neurons(score_F, self.keep) for score_F in layer) for layer in scores
        ]
        engine.plan.keep_neurons(kept)
        if self.reorder and self.execution == "skip":
            engine.prepared.reorder()
        counts = [[len(unit) for unit in layer] for layer in kept]
        return {"keep": self.keep, "neurons": counts, "of": widths, "scores": origin}

    def _scores(
        self, widths: list[list[int]], engine: VisualEngine, context: Context
    ) -> tuple[list[list[torch.Tensor]], str]:
        """Return a score for every neuron of every feed-forward, [F] each, and their origin."""
        if self.choose == "first":
            return [[-torch.arange(float(w)) for w in layer] for layer in widths], "first"
        if self.choose == "random":
            generator = torch.Generator().manual_seed(context.seed)
            return [[torch.rand(w, generator=generator) for w in layer] for layer in widths], (
                "random"
            )
        stats = calibration_stats_for(self.calibration_folder, engine, context)
        return stats.neurons, stats.origin
