"""Settings of a visual plan: execution, windows, heads and neurons, repairs, token quotas.

n is the number of tokens of a frame before any pruning, m the number that is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bench.errors import UserError

# How a plan is carried out, and what a dropped head contributes to visual rows.
Execution = Literal["skip", "masked"]
DroppedHeads = Literal["zero", "text_only"]


@dataclass(frozen=True)
class Quota:
    """Number of tokens of a frame to keep: `share` · n + `count`, rounded, and at least one.

    With `turns`, the number is divided by it and rounded down, because that many pivots choose
    equal numbers of tokens, and `pivots` tokens are kept in addition (DART's release). If
    `recycled` is not 0, removed tokens return in merged form: the `pooled` best of them are merged,
    `cluster_size` into each new token.
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
        """Return the quota for a number (int), a share (float) of a frame's tokens, or "all"."""
        if isinstance(keep, str):
            return Quota(share=1.0)
        return Quota(count=keep) if isinstance(keep, int) else Quota(share=keep)

    @staticmethod
    def averaging(average: float | str, after: int, depth: int) -> Quota:
        """Return the quota with which a frame has `average` tokens in the mean over all layers.

        With all n tokens in the first K = `after` layers and k tokens in the other L - K, the mean
        is (K n + (L - K) k) / L (FastV), which is solved for k.

        Raises:
            UserError: the first K layers alone exceed the given share.
        """
        want, rest = Quota.of(average), depth - after
        quota = Quota((depth * want.share - after) / rest, depth * want.count / rest)
        # A share can be checked here; whether a number of tokens is possible depends on n and is
        # checked in `kept`.
        if quota.count == 0 and quota.share <= 0:
            raise UserError(
                f"average={average} cannot be met: {after} of {depth} layers with all tokens make "
                f"{after / depth:.3g} already; raise average= or prune earlier"
            )
        return quota

    def kept(self, n: int, m: int) -> int:
        """Return how many of a frame's m tokens are kept.

        Raises:
            UserError: the first layers alone exceed the given average number of tokens.
        """
        wanted = self.share * n + self.count
        if wanted <= 0:
            raise UserError(
                f"the average number of tokens cannot be met for an image of {n} tokens: the first "
                "layers, with all tokens, exceed it; raise average= or prune earlier"
            )
        parts = round(wanted) // self.turns
        return min(m, max(1, parts * self.turns + self.pivots))

    def left(self, n: int, m: int) -> int:
        """Return the number of a frame's tokens after the step, including merged ones."""
        kept = self.kept(n, m)
        return kept + self.merged(m - kept)

    def merged(self, gone: int) -> int:
        """Return the number of merged tokens that replace `gone` removed ones."""
        return self.pooled(gone) // self.cluster_size + 1 if self.recycled and gone else 0

    def pooled(self, gone: int) -> int:
        """Return how many of `gone` removed tokens are merged: ⌊`recycled` · gone⌋ + `pool_extra`.

        If there are fewer than `merged`, each merged token is made of a single one.
        """
        # 1e-9 corrects products that are slightly below a whole number.
        return int(self.recycled * gone + 1e-9) + self.pool_extra


def tokens_left(quotas: Sequence[Quota], n: int) -> int:
    """Return the number of tokens that a frame of n has left after several pruning steps."""
    m = n
    for quota in quotas if n else ():
        m = quota.left(n, m)
    return m


@dataclass(frozen=True)
class DecodePruning:
    """Limits generated tokens to a part of the cached visual tokens, from layer `layer` on.

    Each generated token leaves out the fraction `drop` of the visual tokens of its sequence to
    which it attends least in the layer before. They stay in the cache, and later tokens may read
    them. If the cosine similarity between the attention of two successive tokens is at least
    `similarity`, no new choice is made: the second token reads the same visual tokens as the first
    one with `repeats`, and all of them without.
    """

    name: str
    layer: int
    drop: float
    similarity: float
    repeats: bool

    def read(self, n: int) -> int:
        """Return how many of a sequence's n visual tokens are read, at least one.

        Truncated in floating point, as in the release: 1 of 10 with drop=0.8.
        """
        return min(n, max(1, int((1 - self.drop) * n)))


@dataclass(frozen=True)
class Window:
    """Square of visual tokens in one frame to which a visual token attends.

    The square extends `radius` rows and columns to each side; `causal` excludes cells that are
    later in raster order.
    """

    radius: int
    causal: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """Settings of one layer; None means everything.

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
        """Whether the kept heads and neurons have the positions that they had at the refit."""
        # Positions are compared instead of numbers, because columns are stored in the order of the
        # weights, which changes if neurons are reordered or removed.
        if self.down is None or self.neurons is None:
            return self.o is None or heads == self.heads
        same = places is not None and torch.equal(places[0].cpu(), self.neurons.cpu())
        return same and (self.o is None or heads == self.heads)
