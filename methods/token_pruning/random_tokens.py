"""Random tokens: the control that any choice of tokens must beat."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.method import Context
from methods.token_pruning.pruning import BeforeDecoder
from methods.token_pruning.ranking import best
from methods.visual_tokens.sight import Choice, Sight
from methods.visual_tokens.sizes import Sizes


class RandomTokens(BeforeDecoder):
    """Keep random tokens, the same ones in all images of one size, drawn from the run's seed.

    A sample's tokens therefore depend neither on the batch nor on the order of evaluation; average
    over the draw by running several seeds.
    """

    def _chooser(self, context: Context) -> Any:
        return partial(self._drawn, seed=context.seed)

    def _choose(self, sight: Sight, keep_I: Tensor) -> Choice:
        return self._drawn(sight, keep_I, seed=0)

    def _macs(self, sizes: Sizes) -> float:
        return 0.0

    def _drawn(self, sight: Sight, keep_I: Tensor, seed: int) -> Choice:
        score_IM = torch.zeros(sight.valid.shape)
        for number, count in enumerate(sight.frames.counts):
            # A new generator per frame, on the CPU: the draw depends on seed and frame size alone,
            # not on the frame's number in the batch or on the device.
            generator = torch.Generator().manual_seed(seed)
            score_IM[number, :count] = torch.rand(count, generator=generator)
        return Choice(best(score_IM.to(keep_I.device), sight.valid, keep_I))
