"""Neighbour-aware visual attention (arXiv 2410.06169): visual tokens attend to neighbours."""

from __future__ import annotations

from pydantic import Field, field_validator

from bench.method import Context
from bench.models.model import Model
from methods.visual_engine.decoder import VisualEngine
from methods.visual_engine.settings import Window
from methods.visual_engine.strategy import VisualStrategy


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
