"""The numbers from which a selection says what choosing itself multiplies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from bench.models.multimodal.tower import TowerSizes
from methods.visual_tokens.engine import Engine
from methods.visual_tokens.frames import Frames
from methods.visual_tokens.passage import Present
from methods.visual_tokens.plan import Selection
from methods.visual_tokens.rows import Rows


@dataclass(frozen=True)
class Sizes:
    """What a selection works on: `counts` tokens of each frame, of which `kept` stay.

    A text row of one of the `samples` has `keys` text and visual rows before and beside it. `heads`
    heads of width `head_dim` see visual tokens in the layer that ran last; `width` is d_model.
    `tower` is None unless the vision tower is watched.
    """

    counts: tuple[int, ...]
    kept: tuple[int, ...]
    samples: int
    keys: int
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
    counts = Frames.of(here.cells).counts
    ran = engine.prepared.layer(max(selection.after - 1, 0))
    return Sizes(
        counts=counts,
        kept=tuple(selection.quota.kept(n, m) for n, m in zip(whole, counts, strict=True)),
        samples=here.rows.index_BR.shape[0],
        keys=text.count + here.rows.count,
        heads=len(ran.heads.kept),
        head_dim=ran.view.head_dim,
        width=int(cast(Any, engine.decoder.config).hidden_size),
        tower=None if engine.tower is None else engine.tower.sizes(whole),
    )
