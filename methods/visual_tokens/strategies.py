"""Three strategies for visual rows of arXiv 2410.06169: neighbours only, few neurons, few layers.

`head_pruning` is the fourth, `yopo` applies all of them, and VTW (AAAI 2025) is the last one alone.
"""

from __future__ import annotations

from itertools import chain

from pydantic import Field, field_validator
from torch import Tensor

from bench.errors import UserError
from bench.method import Context, InputSize, MethodWork
from bench.models.model import Model
from bench.models.structure.model_structure import ModelStructure
from methods.visual_engine.decoder import VisualEngine
from methods.visual_engine.settings import Window
from methods.visual_engine.strategy import VisualStrategy, tokens_by_stage
from methods.visual_tokens.allocation import (
    Ranking,
    control_scores,
    earliest_cut,
    top_neurons_of_layers,
)
from methods.visual_tokens.calibration import calibration_stats_for, with_calibration


class NeighborAttention(VisualStrategy):
    """Let a visual token attend only to visual tokens in a `window` x `window` square around it.

    Attention to text is unchanged. Windows never extend to other images, tiles or time steps. The
    released code includes neighbours that are later in the sequence; `causal` excludes them, as in
    the paper's figure.
    """

    window: int = Field(default=5, ge=1)
    causal: bool = False

    @field_validator("window")
    @classmethod
    def _has_a_centre(cls, window: int) -> int:
        if window % 2 == 0:
            raise ValueError(f"window={window} must be odd, with the token in its centre")
        return window

    def configure(self, engine: VisualEngine, model: Model, context: Context) -> dict[str, object]:
        """Set the window of visual attention in the plan."""
        engine.plan.set_window(Window(self.window // 2, self.causal))
        return {"window": self.window, "causal": self.causal}


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


class LayerDrop(VisualStrategy):
    """Process visual tokens in the first `layers` layers only; later layers process text alone.

    `share`, used if `layers` is not given, sets the cut as a fraction of the model's layers. With
    `max_kl`, the cut is the earliest one at which the KL divergence of the answer's distribution
    from the dense model's is at most this many nats, averaged over the calibration images (VTW's
    criterion). Statistics are read from `calibration_folder`, a saved calibration, or measured on
    the run's images.
    """

    layers: int | None = Field(default=None, ge=1)
    share: float = Field(default=0.5, gt=0, le=1)
    max_kl: float | None = Field(default=None, ge=0)
    calibration_folder: str | None = None

    @property
    def uses_prompts(self) -> bool:
        """Whether the KL of a cut is measured on the run's prompts."""
        return self.max_kl is not None and self.calibration_folder is None

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Add the calibration, if the KL of a cut is measured on prompts of this run."""
        work = super().work(structure, inputs)
        return with_calibration(work, structure, inputs) if self.uses_prompts else work

    def check(self, structure: ModelStructure) -> None:
        """Also refuse more layers than the decoder has."""
        super().check(structure)
        if self.layers is not None and self.layers > len(structure.layers):
            raise UserError(
                f"layers={self.layers} is too large: {structure.architecture} has "
                f"{len(structure.layers)} layers"
            )

    def configure(self, engine: VisualEngine, model: Model, context: Context) -> dict[str, object]:
        """Set and report the layer before which visual tokens are removed."""
        depth = len(engine.decoder.layers)
        if self.max_kl is not None:
            stats = calibration_stats_for(self.calibration_folder, engine, context)
            cut = earliest_cut(stats, self.max_kl)
            engine.plan.cut_at(cut)
            return {"layers": cut, "of": depth, "calibration": stats.origin}
        cut = self.layers if self.layers is not None else max(1, round(self.share * depth))
        engine.plan.cut_at(cut)
        return {"layers": cut, "of": depth}


class VTW(LayerDrop):
    """Drop all visual tokens after `layers` layers (K), or after a `share` of them.

    This is `layer_drop` alone, without the rest of YOPO and without training. `max_kl` is the
    paper's criterion for K. The paper's values of K are 16 of 32 and 20 of 40 layers.
    """

    def configure(self, engine: VisualEngine, model: Model, context: Context) -> dict[str, object]:
        """Also report the tokens of each stage."""
        return super().configure(engine, model, context) | tokens_by_stage(engine)
