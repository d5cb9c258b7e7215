"""How many visual tokens of a frame stay after a selection.

n is the number of tokens that the frame came with, m the number that it has left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.errors import UserError


@dataclass(frozen=True)
class Quota:
    """`share` · n + `count` tokens of a frame stay, rounded, and at least one.

    Of those that go, `recycled` · (m - kept), rounded down, and one more come back as merged
    tokens, if `recycled` is not 0.
    """

    share: float = 0.0
    count: float = 0.0
    recycled: float = 0.0

    @staticmethod
    def of(keep: float | str) -> Quota:
        """Return a number of tokens (an int), a share of a frame's tokens (a float), or "all"."""
        if isinstance(keep, str):
            return Quota(share=1.0)
        return Quota(count=keep) if isinstance(keep, int) else Quota(share=keep)

    @staticmethod
    def averaging(average: float | str, after: int, depth: int) -> Quota:
        """Return what must stay for a frame to average so many tokens over all layers.

        With K = `after` layers of all n tokens and L - K of k, the average is
        (K n + (L - K) k) / L (FastV), which is solved for k.

        Raises:
            UserError: a share that the first K layers exceed alone.
        """
        want, rest = Quota.of(average), depth - after
        quota = Quota((depth * want.share - after) / rest, depth * want.count / rest)
        if quota.count == 0 and quota.share <= 0:
            raise UserError(
                f"average={average} cannot be met: {after} of {depth} layers with all tokens are "
                f"{after / depth:.3g} of them already"
            )
        return quota

    def kept(self, n: int, m: int) -> int:
        """Return how many of a frame's m tokens stay.

        Raises:
            UserError: an average number of tokens that the first layers exceed alone.
        """
        wanted = self.share * n + self.count
        if wanted <= 0:
            raise UserError(
                f"the average number of tokens cannot be met on an image of {n} tokens: its first "
                "layers, with all of them, exceed it; raise average= or select earlier"
            )
        return min(m, max(1, round(wanted)))

    def left(self, n: int, m: int) -> int:
        """Return how many tokens a frame has afterwards, merged ones included."""
        kept = self.kept(n, m)
        return kept + self.merged(m - kept)

    def merged(self, gone: int) -> int:
        """Return how many merged tokens come back of so many that go."""
        return int(self.recycled * gone + 1e-9) + 1 if self.recycled and gone else 0


def left_after(quotas: Sequence[Quota], n: int) -> int:
    """Return how many tokens are left of a frame of n after several selections."""
    m = n
    for quota in quotas if n else ():
        m = quota.left(n, m)
    return m
