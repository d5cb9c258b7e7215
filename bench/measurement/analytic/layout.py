"""The tokens of one call as numbers: how many of each kind, and how many keys each of them sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.models.products import Rows


@dataclass(frozen=True)
class Layout:
    """Places of the call's new tokens in their sequence, int64 [L], and which are visual, [L].

    `batch` sequences are alike; `past` tokens are in the cache already.
    """

    places: Tensor
    visual: Tensor
    batch: int = 1
    past: int = 0

    @staticmethod
    def text(batch: int, length: int, past: int = 0) -> Layout:
        """Return a call of text alone."""
        return Layout(
            torch.arange(past, past + length), torch.zeros(length, dtype=torch.bool), batch, past
        )

    @staticmethod
    def prompt(visual_BS: Tensor) -> Layout:
        """Return a prompt whose visual tokens are marked; its samples must be alike."""
        visual_S = visual_BS[0].cpu()
        return Layout(torch.arange(len(visual_S)), visual_S, len(visual_BS))

    @property
    def keys(self) -> int:
        """How many keys there are for one sequence, cached ones included."""
        return self.past + len(self.places)

    def kinds(self) -> list[tuple[Rows, Tensor]]:
        """Return text rows and visual rows by their places, kinds without rows left out."""
        both: list[tuple[Rows, Tensor]] = [
            ("text", self.places[~self.visual]),
            ("visual", self.places[self.visual]),
        ]
        return [(rows, places) for rows, places in both if len(places)]

    def seen(self, places: Tensor, window: int | None) -> int:
        """Return how many keys all rows see: each itself and those before it in its window."""
        keys = places + 1
        return int((keys if window is None else keys.clamp(max=window)).sum()) * self.batch
