"""Visual layer drop (arXiv 2410.06169), and VTW (AAAI 2025) as a special case."""

from __future__ import annotations

from pydantic import Field

from bench.errors import UserError
from bench.method import Context, InputSize, MethodWork
from bench.models.model import Model
from bench.models.structure.model_structure import ModelStructure
from methods.visual_engine.decoder import VisualEngine
from methods.visual_engine.strategy import VisualStrategy, tokens_by_stage
from methods.visual_tokens.allocation import earliest_cut
from methods.visual_tokens.calibration import calibration_stats_for, with_calibration


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
