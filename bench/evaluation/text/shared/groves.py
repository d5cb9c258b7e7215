"""Cutting a trie into rows of a forward, and into trunks that many rows stand on.

A row costs attention between all of its tokens, so it is kept short unless its tokens share much.
A branch that is cut off costs the tokens it shared; where those are many, they become a trunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.evaluation.text.shared.trie import Trie


@dataclass(frozen=True)
class Limits:
    """When a row is too long and a trunk long enough, in tokens.

    A `row` of unrelated paths is so short that attention is a small part of its work; a `tree`, of
    which a good part is shared, may be longer. From `worth` on a beginning deserves a forward of
    its own.
    """

    row: int = 256
    tree: int = 2048
    worth: int = 32


LIMITS = Limits()


@dataclass(frozen=True, eq=False)
class Trunk:
    """The tokens from `start` to `stop` of the leaves `low` to `high`, which are the same."""

    parent: Trunk | None
    low: int
    high: int
    start: int
    stop: int


@dataclass(frozen=True)
class Row:
    """Leaves `low` to `high` below the depth `start`: `size` tokens in one row of a batch."""

    low: int
    high: int
    start: int
    size: int

    @property
    def is_path(self) -> bool:
        """Whether it has no branches, so that the network's own mask is right for it."""
        return self.high - self.low == 1


@dataclass
class Grove:
    """Rows that stand on one trunk, or on none."""

    trunk: Trunk | None
    rows: list[Row] = field(default_factory=list)


def cut(trie: Trie, limits: Limits = LIMITS, window: int | None = None) -> list[Grove]:
    """Cut a trie into groves, a trunk's parent before it.

    A leaf longer than the network's sliding `window` is a row of its own, for that the network
    knows how to mask.
    """
    ground = Grove(None)
    groves = [ground]
    for low, high in _shallow(trie, window, ground):
        _cut(trie, limits, (low, high, ground), groves)
    for grove in groves:
        grove.rows = sorted(_joined(trie, grove.rows, limits, window), key=lambda row: -row.size)
    return groves


def split(trie: Trie, row: Row) -> tuple[Row, Row] | None:
    """Return a row in two halves, or None when it is a single path."""
    if row.is_path:
        return None
    middle = (row.low + row.high) // 2
    return _row(trie, row.low, middle, row.start), _row(trie, middle, row.high, row.start)


def _shallow(trie: Trie, window: int | None, ground: Grove) -> Iterator[tuple[int, int]]:
    """Yield the ranges of leaves that fit the window; the others become rows at once."""
    low = 0
    for leaf in range(len(trie)):
        if window is not None and trie.lengths[leaf] > window:
            ground.rows.append(_row(trie, leaf, leaf + 1, 0))
            if low < leaf:
                yield low, leaf
            low = leaf + 1
    if low < len(trie):
        yield low, len(trie)


def _cut(trie: Trie, limits: Limits, whole: tuple[int, int, Grove], groves: list[Grove]) -> None:
    """Cut a range of a grove's leaves into its rows, and into groves on trunks of their own."""
    pending = [whole]
    while pending:
        low, high, grove = pending.pop()
        start = grove.trunk.stop if grove.trunk else 0
        size = trie.size(low, high, start)
        common = trie.common(low, high)
        is_deep = common - start >= limits.worth
        fits = size <= limits.row or (
            is_deep and size <= limits.tree and 4 * (common - start) >= size
        )
        if fits or high - low == 1:
            grove.rows.append(_row(trie, low, high, start))
            continue
        if is_deep:
            grove = Grove(Trunk(grove.trunk, low, high, start, common))
            groves.append(grove)
        branches = trie.branches(low, high, common)
        pending += [(*branch, grove) for branch in reversed(branches)]


def _joined(trie: Trie, rows: list[Row], limits: Limits, window: int | None) -> Iterator[Row]:
    """Join neighbours while they are short together: they share beginnings, too."""
    waiting: Row | None = None
    for row in sorted(rows, key=lambda row: row.low):
        if waiting is None:
            waiting = row
            continue
        size = trie.size(waiting.low, row.high, row.start)
        is_deep = window is not None and trie.lengths[waiting.low : row.high].max() > window
        if waiting.high == row.low and size <= limits.row and not is_deep:
            waiting = Row(waiting.low, row.high, row.start, size)
        else:
            yield waiting
            waiting = row
    if waiting is not None:
        yield waiting


def _row(trie: Trie, low: int, high: int, start: int) -> Row:
    return Row(low, high, start, trie.size(low, high, start))
