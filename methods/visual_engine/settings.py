"""Settings of a visual plan: execution, windows, heads and neurons, repairs, token quotas.

n is the number of tokens that a frame had before any pruning, m the number that it has left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bench.errors import UserError

# How a plan is carried out, and what visual rows get from a dropped head.
Execution = Literal["skip", "masked"]
DroppedHeads = Literal["zero", "text_only"]


@dataclass(frozen=True)
class Quota:
    """`share` · n + `count` tokens of a frame stay, rounded, and at least one.

    With `turns`, that many pivots take equal whole parts of this number, and `pivots` tokens stay
    besides (DART's release). Unless `recycled` is 0, the removed ones return merged: of the
    `pooled` best, `cluster_size` make one token.
    """

    share: float = 0.0
    count: float = 0.0
    recycled: float = 0.0
    pool_extra: int = 0
    cluster_size: int = 10
    turns: int = 1
    pivots: int = 0

    @staticmethod
    def of(keep: float | str) -> Quota:
        """Return the quota of a number (int) or share (float) of a frame's tokens, or of "all"."""
        if isinstance(keep, str):
            return Quota(share=1.0)
        return Quota(count=keep) if isinstance(keep, int) else Quota(share=keep)

    @staticmethod
    def averaging(average: float | str, after: int, depth: int) -> Quota:
        """Return the quota that makes a frame average this many tokens over all layers.

        With K = `after` layers of all n tokens and L - K layers of k, the average is (K n + (L - K)
        k) / L (FastV), which is solved for k.

        Raises:
            UserError: the first K layers alone exceed the given share.
        """
        want, rest = Quota.of(average), depth - after
        quota = Quota((depth * want.share - after) / rest, depth * want.count / rest)
        # A share can be judged without a frame; a number of tokens depends on n and is judged in
        # `kept`.
        if quota.count == 0 and quota.share <= 0:
            raise UserError(
                f"average={average} cannot be met: {after} of {depth} layers with all tokens make "
                f"{after / depth:.3g} already; raise average= or prune earlier"
            )
        return quota

    def kept(self, n: int, m: int) -> int:
        """Return the number of a frame's m tokens that stay.

        Raises:
            UserError: the first layers alone exceed the given average number of tokens.
        """
        wanted = self.share * n + self.count
        if wanted <= 0:
            raise UserError(
                f"the average number of tokens cannot be met on an image of {n} tokens: its first "
                "layers, with all of them, exceed it; raise average= or prune earlier"
            )
        parts = round(wanted) // self.turns
        return min(m, max(1, parts * self.turns + self.pivots))

    def left(self, n: int, m: int) -> int:
        """Return the number of a frame's tokens afterwards, merged ones included."""
        kept = self.kept(n, m)
        return kept + self.merged(m - kept)

    def merged(self, gone: int) -> int:
        """Return how many merged tokens replace `gone` removed ones."""
        return self.pooled(gone) // self.cluster_size + 1 if self.recycled and gone else 0

    def pooled(self, gone: int) -> int:
        """Return how many of `gone` removed tokens are merged, ⌊`recycled` · gone⌋ and the extra.

        There may be fewer than `merged`: a merged token is then made of one.
        """
        # The 1e-9 keeps a product that is a whole number from rounding down to the one below.
        return int(self.recycled * gone + 1e-9) + self.pool_extra


def tokens_left(quotas: Sequence[Quota], n: int) -> int:
    """Return the number of tokens left of a frame of n after several pruning steps."""
    m = n
    for quota in quotas if n else ():
        m = quota.left(n, m)
    return m


@dataclass(frozen=True)
class DecodePruning:
    """Generated tokens read a part of the cached visual tokens, from layer `layer` on.

    For each of them, the share `drop` of its sequence's visual tokens is left out that it attends
    to least in the layer before. They stay in the cache, and the next token may read them. Where
    the cosine between the attention of two successive tokens is at least `similarity`, nothing new
    is chosen: what the token before read is read again with `repeats`, everything without.
    """

    name: str
    layer: int
    drop: float
    similarity: float
    repeats: bool

    def read(self, n: int) -> int:
        """Return how many of a sequence's n visual tokens are read, at least one.

        In floating point and cut off, as in the release: of 10 with drop=0.8, one.
        """
        return min(n, max(1, int((1 - self.drop) * n)))


@dataclass(frozen=True)
class Window:
    """Square of visual tokens in one frame that a visual token attends to.

    It extends `radius` rows and columns to each side; `causal` excludes cells that come later in
    raster order.
    """

    radius: int
    causal: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """One layer's settings; None means everything.

    `heads` are the query heads used for visual tokens, `neurons` one index tensor [kept] for each
    gated feed-forward of the layer (`DecoderLayer.units`).
    """

    heads: tuple[int, ...] | None = None
    neurons: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class RepairedProjections:
    """Columns of one layer's projections, refitted for visual rows by least squares.

    `o` [D, h·d] are those of the kept heads at the positions `heads`, `down` [D, f] those of a
    dense feed-forward's neurons at the positions `neurons`; None if not refitted.
    """

    heads: tuple[int, ...]
    o: Tensor | None
    neurons: Tensor | None
    down: Tensor | None

    def fits(self, heads: tuple[int, ...], places: tuple[Tensor, ...] | None) -> bool:
        """Whether the kept heads and neurons are still where the columns were refitted."""
        # Positions, not numbers: the columns are stored in the order of the weights, which
        # reordering or removing neurons afterwards would change.
        if self.down is None or self.neurons is None:
            return self.o is None or heads == self.heads
        same = places is not None and torch.equal(places[0].cpu(), self.neurons.cpu())
        return same and (self.o is None or heads == self.heads)
