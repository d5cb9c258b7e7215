"""The numbers from which a selection says what choosing itself multiplies."""

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
    """What a selection works on: `counts` tokens of each frame, of which `kept` stay.

    A text row of one of the `samples` has `keys` text and visual rows before and beside it, `text`
    of them text; `asked` text rows come after the last image, `entered` visual rows came into the
    decoder, of the sample that has most. `heads` heads of width `head_dim` see visual tokens in
    the layer that ran last; `width` is d_model. `tower` is None unless the vision tower is watched.
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
        """How many pairs of tokens there are in frames that are packed to one length."""
        return len(self.counts) * max(self.counts) ** 2

    @property
    def row_macs(self) -> int:
        """What one text row of every sample costs against all keys, in all heads: q · k alone."""
        return self.samples * self.heads * self.keys * self.head_dim


def sizes_of(
    engine: Engine, selection: Selection, text: Rows, here: Present, whole: tuple[int, ...]
) -> Sizes:
    """Return what a selection works on before it chooses; `whole` are its frames' own tokens."""
    frames = Frames.of(here.cells)
    counts, samples = frames.counts, here.rows.index_BR.shape[0]
    entered_B = torch.zeros(samples, dtype=torch.int64)
    entered_B.index_add_(0, frames.sample_I.cpu(), torch.tensor(whole))
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
