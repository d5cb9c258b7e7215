"""Prefill time under the engine's plan, as a share of the dense prefill's time."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from bench.device.clock import Clock
from bench.models.multimodal import Samples
from methods.visual_tokens.engine import Engine

ROUNDS = 5


class Stopwatch:
    """Times one prompt's prefill, dense and planned in turn."""

    def __init__(self, engine: Engine, samples: Samples) -> None:
        self._engine = engine
        self._call: dict[str, Any] = dict(samples.inputs[0])
        self.readings = 0

    @torch.no_grad()
    def share(self) -> float:
        """Return the median time of the plan divided by that of the dense network."""
        self.readings += 1
        planned, dense = [], []
        for number in range(ROUNDS + 1):
            # Alternating runs see the same machine: a clock that changes or a neighbour's load hits
            # both, and medians discard the runs it hits alone.
            took = self._seconds()
            with self._engine.dense():
                whole = self._seconds()
            # The first round pays for weight slices, kernel selection and allocation.
            if number:
                planned.append(took)
                dense.append(whole)
        return statistics.median(planned) / statistics.median(dense)

    def _seconds(self) -> float:
        clock = Clock(next(self._engine.network.parameters()).device)
        clock.mark()
        self._engine.network(**self._call, use_cache=True, logits_to_keep=1)
        clock.mark()
        return clock.laps()[0]
