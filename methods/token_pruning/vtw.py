"""VTW, visual tokens withdrawal (Lin et al., AAAI 2025): remove all visual tokens at one layer."""

from __future__ import annotations

from typing import Any

from bench.method import Context
from bench.models.model import Model
from methods.token_pruning.pruning import tokens_of
from methods.visual_tokens.engine import Engine
from methods.visual_tokens.layer_drop import LayerDrop


class VTW(LayerDrop):
    """Drop all visual tokens after `layers` layers (K), or after a `share` of them.

    Equals `layer_drop` alone, without the rest of YOPO and without training. With `max_kl`, the
    paper's criterion, K is the earliest layer at which the distribution of the answers stays within
    this many nats of the dense one. The paper's K are 16 of 32 and 20 of 40 layers.
    """

    def _set(self, engine: Engine, model: Model, context: Context) -> dict[str, Any]:
        return super()._set(engine, model, context) | tokens_of(engine)
