"""Visual layer drop (arXiv 2410.06169): visual tokens leave the decoder after some layers."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from bench.errors import UserError
from bench.method import Context
from bench.models.anatomy import Anatomy
from bench.models.model import Model
from methods.visual_tokens.engine import Engine
from methods.visual_tokens.findings import findings_for
from methods.visual_tokens.selection import earliest_cut
from methods.visual_tokens.strategy import VisualStrategy


class LayerDrop(VisualStrategy):
    """Process visual tokens in the first `layers` layers only; later layers process text alone.

    `share` sets the same as a fraction of the model's layers and is used if `layers` is not given.
    With `max_kl`, the cut is the earliest layer after which the answer's distribution is at most
    this many nats from the dense model's, averaged over the calibration images (VTW's criterion);
    statistics are read from `settings`, the folder of a calibration, or measured on the run's
    images.
    """

    layers: int | None = Field(default=None, ge=1)
    share: float = Field(default=0.5, gt=0, le=1)
    max_kl: float | None = Field(default=None, ge=0)
    settings: str | None = None

    @property
    def uses_prompts(self) -> bool:
        """Whether the harm of a cut is measured on the run's prompts."""
        return self.max_kl is not None and self.settings is None

    def check(self, anatomy: Anatomy) -> None:
        """Also refuse more layers than the decoder has."""
        super().check(anatomy)
        if self.layers is not None and self.layers > len(anatomy.layers):
            raise UserError(
                f"layers={self.layers}: {anatomy.architecture} has {len(anatomy.layers)} layers"
            )

    def _set(self, engine: Engine, model: Model, context: Context) -> dict[str, Any]:
        depth = len(engine.decoder.layers)
        if self.max_kl is not None:
            findings = findings_for(self.settings, engine, context)
            cut = earliest_cut(findings, self.max_kl)
            engine.plan.cut_at(cut)
            return {"layers": cut, "of": depth, "findings": findings.origin}
        cut = self.layers if self.layers is not None else max(1, round(self.share * depth))
        engine.plan.cut_at(cut)
        return {"layers": cut, "of": depth}
