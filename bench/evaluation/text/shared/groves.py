"""Packing plan: a trie cut into packed sequences and the shared prefixes that they follow.

A sequence costs attention between all of its tokens, so it is kept short unless its tokens share
much. A branch that is cut off repeats the tokens it shared; where those are many, they become a
cached prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.evaluation.text.shared.trie import Trie


@dataclass(frozen=True)
class Limits:
    """When a sequence is too long and a prefix long enough, in tokens.

    `row` bounds a sequence of unrelated paths, short enough that attention is a small part of its
    work; `tree` bounds one that shares a good part of its tokens. A prefix of at least `worth`
    tokens gets a forward of its own.
    """

    # Attention is quadratic in the length of a sequence, the rest of a layer linear. A prefix below
    # `worth` is cheaper repeated than computed apart: its forward loads all weights for a few
    # tokens, and every batch after it concatenates its keys and values.
    row: int = 256
    tree: int = 2048
    worth: int = 32


LIMITS = Limits()


@dataclass(frozen=True, eq=False)
class Trunk:
    """The tokens from depth `start` to `stop`, which leaves `low` to `high` have in common."""

    parent: Trunk | None
    low: int
    high: int
    start: int
    stop: int


@dataclass(frozen=True)
class Row:
    """Leaves `low` to `high` below depth `start`, as one sequence of `size` tokens."""

    low: int
    high: int
    start: int
    size: int

    @property
    def is_path(self) -> bool:
        """Whether it has no branches, so that the network's own causal mask is right for it."""
        return self.high - self.low == 1


@dataclass
class Grove:
    """Packed sequences that follow one shared prefix, or none."""

    trunk: Trunk | None
    rows: list[Row] = field(default_factory=list)


def cut(trie: Trie, limits: Limits = LIMITS, window: int | None = None) -> list[Grove]:
    """Cut a trie into prefix groups, the parent of a prefix before the prefix itself.

    Sequences longer than the sliding `window` are packed alone: the model's own mask is then
    correct, whereas the tree mask knows no window.
    """
    ground = Grove(None)
    groves = [ground]
    for low, high in _shallow(trie, window, ground):
        _cut(trie, limits, (low, high, ground), groves)
    for grove in groves:
        # Widest first: the scorer batches neighbours, and the batch most likely to run out of
        # memory comes before any other.
        grove.rows = sorted(_joined(trie, grove.rows, limits, window), key=lambda row: -row.size)
    return groves


def split(trie: Trie, row: Row) -> tuple[Row, Row] | None:
    """Return a packed sequence in two halves, or None if it is a single path."""
    if row.is_path:
        return None
    middle = (row.low + row.high) // 2
    return _row(trie, row.low, middle, row.start), _row(trie, middle, row.high, row.start)


def _shallow(trie: Trie, window: int | None, ground: Grove) -> Iterator[tuple[int, int]]:
    """Yield the ranges of leaves that fit the window; longer leaves become sequences at once."""
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
    """Cut a range of a group's leaves into sequences, and into groups with a longer prefix."""
    # A stack instead of recursion: tries are as deep as prompts, thousands of tokens.
    pending = [whole]
    while pending:
        low, high, grove = pending.pop()
        start = grove.trunk.stop if grove.trunk else 0
        size = trie.size(low, high, start)
        common = trie.common(low, high)
        is_deep = common - start >= limits.worth
        # The trade: a long sequence pays quadratic attention between branches that do not see each
        # other, a cut repeats their common tokens or caches them. Beyond `row`, a sequence stays
        # whole only if at least a quarter of it is common to all of its paths.
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
        # Reversed, so that branches leave the stack in order. Groups are thus appended depth first,
        # which the scorer relies on to drop prefixes that no later group can need.
        pending += [(*branch, grove) for branch in reversed(branches)]


def _joined(trie: Trie, rows: list[Row], limits: Limits, window: int | None) -> Iterator[Row]:
    """Merge neighbours that are short together; tokens they share are then computed once."""
    waiting: Row | None = None
    for row in sorted(rows, key=lambda row: row.low):
        if waiting is None:
            waiting = row
            continue
        # Only neighbours can be merged: a sequence is a range of sorted leaves. The window is
        # checked again, because a leaf that exceeds it stands among the neighbours and must stay
        # alone.
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
