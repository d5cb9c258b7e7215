"""Tokens of one call: how many of each kind, and how many keys each of them attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.models.products import Rows


@dataclass(frozen=True)
class Layout:
    """New tokens of a call: `places`, positions in the sequence, int64 [L]; `visual`, bool [L].

    All `batch` sequences have the same tokens. `past` tokens are already in the KV cache.
    """

    places: Tensor
    visual: Tensor
    batch: int = 1
    past: int = 0

    @staticmethod
    def text(batch: int, length: int, past: int = 0) -> Layout:
        """Return the layout of a call without images."""
        return Layout(
            torch.arange(past, past + length), torch.zeros(length, dtype=torch.bool), batch, past
        )

    @staticmethod
    def prompt(visual_BS: Tensor) -> Layout:
        """Return the layout of a prompt; all samples of `visual_BS` must have the same mask."""
        # The first sample stands for all: measured prompts are copies of one prompt.
        visual_S = visual_BS[0].cpu()
        return Layout(torch.arange(len(visual_S)), visual_S, len(visual_BS))

    @property
    def keys(self) -> int:
        """Number of keys of one sequence, cached ones included."""
        return self.past + len(self.places)

    def kinds(self) -> list[tuple[Rows, Tensor]]:
        """Return the positions of text and of visual tokens; a kind without tokens is left out."""
        both: list[tuple[Rows, Tensor]] = [
            ("text", self.places[~self.visual]),
            ("visual", self.places[self.visual]),
        ]
        return [(rows, places) for rows, places in both if len(places)]

    def seen(self, places: Tensor, window: int | None) -> int:
        """Return the number of causal (query, key) pairs of the tokens at `places`.

        A token attends to itself and to earlier tokens, at most `window` keys in all.
        """
        # Positions count from 0 and include the cache, so the token at p has p + 1 keys.
        keys = places + 1
        return int((keys if window is None else keys.clamp(max=window)).sum()) * self.batch
