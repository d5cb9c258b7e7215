"""Sizes from which a pruning step computes the multiply-adds of its choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch

from bench.models.multimodal.tower import TowerSizes
from methods.visual_tokens.engine import Engine
from methods.visual_tokens.frames import Frames
from methods.visual_tokens.passage import Present
from methods.visual_tokens.plan import Selection
from methods.visual_tokens.rows import Rows, after_images


@dataclass(frozen=True)
class Sizes:
    """Input sizes of a pruning step: `counts` tokens of each frame, of which `kept` stay.

    A text row of one of the `samples` has `keys` text and visual rows to attend to, `text` of them
    text. `asked` is the number of text rows after the last image, `entered` that of visual rows
    that entered the decoder, both of the sample that has most. `heads` heads of width `head_dim`
    attend to visual tokens in the preceding layer; `width` is d_model. `tower` is None unless the
    vision tower is recorded.
    """

    counts: tuple[int, ...]
    kept: tuple[int, ...]
    samples: int
    keys: int
    text: int
    asked: int
    entered: int
    heads: int
    head_dim: int
    width: int
    tower: TowerSizes | None

    @property
    def pairs(self) -> int:
        """Number of token pairs in frames padded to one length."""
        return len(self.counts) * max(self.counts) ** 2

    @property
    def row_macs(self) -> int:
        """Multiply-adds of q · k for one text row per sample against all keys, in all heads."""
        return self.samples * self.heads * self.keys * self.head_dim


def sizes_of(
    engine: Engine, selection: Selection, text: Rows, here: Present, whole: tuple[int, ...]
) -> Sizes:
    """Return the sizes before a pruning step; `whole` are the frames' original token counts."""
    frames = Frames.of(here.cells)
    counts, samples = frames.counts, here.rows.index_BR.shape[0]
    entered_B = torch.zeros(samples, dtype=torch.int64)
    entered_B.index_add_(0, frames.sample_I.cpu(), torch.tensor(whole))
    # A step before the decoder has no preceding layer; it reads no attention either, so layer 0
    # only fills the fields.
    ran = engine.prepared.layer(max(selection.after - 1, 0))
    return Sizes(
        counts=counts,
        kept=tuple(selection.quota.kept(n, m) for n, m in zip(whole, counts, strict=True)),
        samples=samples,
        keys=text.count + here.rows.count,
        text=text.count,
        asked=int(after_images(text, here.rows).sum(dim=1).max()),
        entered=int(entered_B.max()),
        heads=len(ran.heads.kept),
        head_dim=ran.view.head_dim,
        width=int(cast(Any, engine.decoder.config).hidden_size),
        tower=None if engine.tower is None else engine.tower.sizes(whole),
    )
