"""How long a prefill takes under the engine's plan, as a share of the dense one's time."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from bench.device.clock import Clock
from bench.models.multimodal import Samples
from methods.visual_tokens.engine import Engine

ROUNDS = 5


class Stopwatch:
    """Times one prompt's prefill, dense and planned in turn, so that both meet the same machine."""

    def __init__(self, engine: Engine, samples: Samples) -> None:
        self._engine = engine
        self._call: dict[str, Any] = dict(samples.inputs[0])
        self.readings = 0

    @torch.no_grad()
    def share(self) -> float:
        """Return the median time of the plan over the median time of the dense network."""
        self.readings += 1
        planned, dense = [], []
        for number in range(ROUNDS + 1):
            took = self._seconds()
            with self._engine.dense():
                whole = self._seconds()
            if number:  # the first round pays for what is prepared once
                planned.append(took)
                dense.append(whole)
        return statistics.median(planned) / statistics.median(dense)

    def _seconds(self) -> float:
        clock = Clock(next(self._engine.network.parameters()).device)
        clock.mark()
        self._engine.network(**self._call, use_cache=True, logits_to_keep=1)
        clock.mark()
        return clock.laps()[0]
