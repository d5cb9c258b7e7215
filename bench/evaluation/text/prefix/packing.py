"""From a trie to packed sequences with tree attention, and the shared prefixes they stand on.

Packing plan: a trie cut into packed sequences and the shared prefixes that they follow.

A sequence costs attention between all of its tokens, so it is kept short unless its tokens share
much. A branch that is cut off repeats the tokens it shared; where those are many, they become a
cached prefix.

Packed sequences as arrays: tokens, depths, subtree ends, and the positions to read.

Tokens are written depth first, so the descendants of a token follow it directly. A token is thus
visible to the positions after it and before its `subtree_end`: one comparison instead of a walk
through the trie.

Suffixes: B sequences of a batch, T positions of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from bench.evaluation.text.prefix.trie import Ints, Read, Trie


@dataclass(frozen=True)
class PackingLimits:
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


DEFAULT_LIMITS = PackingLimits()


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """The tokens from depth `start` to `stop`, which leaves `low` to `high` have in common."""

    parent: SharedPrefix | None
    low: int
    high: int
    start: int
    stop: int


@dataclass(frozen=True)
class PackedSequence:
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
class PrefixGroup:
    """Packed sequences that follow one shared prefix, or none."""

    trunk: SharedPrefix | None
    rows: list[PackedSequence] = field(default_factory=list)


def group_by_prefix(
    trie: Trie, limits: PackingLimits = DEFAULT_LIMITS, window: int | None = None
) -> list[PrefixGroup]:
    """Cut a trie into prefix groups, the parent of a prefix before the prefix itself.

    Sequences longer than the sliding `window` are packed alone: the model's own mask is then
    correct, whereas the tree mask knows no window.
    """
    ground = PrefixGroup(None)
    groves = [ground]
    for low, high in _within_window(trie, window, ground):
        _group_range(trie, limits, (low, high, ground), groves)
    for grove in groves:
        # Widest first: the scorer batches neighbours, and the batch most likely to run out of
        # memory comes before any other.
        grove.rows = sorted(
            _merge_neighbours(trie, grove.rows, limits, window), key=lambda row: -row.size
        )
    return groves


def halve(trie: Trie, row: PackedSequence) -> tuple[PackedSequence, PackedSequence] | None:
    """Return a packed sequence in two halves, or None if it is a single path."""
    if row.is_path:
        return None
    middle = (row.low + row.high) // 2
    return _packed_sequence(trie, row.low, middle, row.start), _packed_sequence(
        trie, middle, row.high, row.start
    )


def _within_window(
    trie: Trie, window: int | None, ground: PrefixGroup
) -> Iterator[tuple[int, int]]:
    """Yield the ranges of leaves that fit the window; longer leaves become sequences at once."""
    low = 0
    for leaf in range(len(trie)):
        if window is not None and trie.lengths[leaf] > window:
            ground.rows.append(_packed_sequence(trie, leaf, leaf + 1, 0))
            if low < leaf:
                yield low, leaf
            low = leaf + 1
    if low < len(trie):
        yield low, len(trie)


def _group_range(
    trie: Trie,
    limits: PackingLimits,
    whole: tuple[int, int, PrefixGroup],
    groves: list[PrefixGroup],
) -> None:
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
            grove.rows.append(_packed_sequence(trie, low, high, start))
            continue
        if is_deep:
            grove = PrefixGroup(SharedPrefix(grove.trunk, low, high, start, common))
            groves.append(grove)
        branches = trie.branches(low, high, common)
        # Reversed, so that branches leave the stack in order. Groups are thus appended depth first,
        # which the scorer relies on to drop prefixes that no later group can need.
        pending += [(*branch, grove) for branch in reversed(branches)]


def _merge_neighbours(
    trie: Trie, rows: list[PackedSequence], limits: PackingLimits, window: int | None
) -> Iterator[PackedSequence]:
    """Merge neighbours that are short together; tokens they share are then computed once."""
    waiting: PackedSequence | None = None
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
            waiting = PackedSequence(waiting.low, row.high, row.start, size)
        else:
            yield waiting
            waiting = row
    if waiting is not None:
        yield waiting


def _packed_sequence(trie: Trie, low: int, high: int, start: int) -> PackedSequence:
    return PackedSequence(low, high, start, trie.size(low, high, start))


class ReadPositions(NamedTuple):
    """A part of a request: targets, and the positions of a sequence or batch that predict them."""

    number: int
    places: Ints
    targets: Ints


class PackedBatch(NamedTuple):
    """Packed sequences side by side; positions of reads count through the flattened batch.

    `subtree_end_BT` is None if no sequence branches. Padding is on the right, where it sees itself
    only and is seen by nothing.
    """

    tokens_BT: Ints
    depths_BT: Ints
    subtree_end_BT: Ints | None
    asked: list[ReadPositions]


def pack(trie: Trie, rows: Sequence[PackedSequence]) -> PackedBatch:
    """Pack sequences that follow one prefix into a batch."""
    width = max(row.size for row in rows)
    start = rows[0].start
    shape = (len(rows), width)
    tokens_BT = np.zeros(shape, dtype=np.int64)
    depths_BT = np.broadcast_to(start + np.arange(width), shape).copy()
    # Padding keeps this default, its own position + 1: it sees itself, since a softmax over nothing
    # would be NaN.
    subtree_end_BT = np.broadcast_to(1 + np.arange(width), shape).copy()
    asked: list[ReadPositions] = []
    for number, row in enumerate(rows):
        written = (tokens_BT[number], depths_BT[number], subtree_end_BT[number])
        before = number * width
        asked += [
            place._replace(places=place.places + before)
            for place in _write_sequence(trie, row, *written)
        ]
    branches = any(not row.is_path for row in rows)
    return PackedBatch(tokens_BT, depths_BT, subtree_end_BT if branches else None, asked)


def pack_prefix(trie: Trie, trunk: SharedPrefix) -> PackedBatch:
    """Pack the tokens of a prefix as one sequence, with all reads that its leaves have in it."""
    tokens_1T = trie.leaves[trunk.low][None, trunk.start : trunk.stop]
    depths_1T = np.arange(trunk.start, trunk.stop)[None]
    path = np.arange(-trunk.start, trunk.stop - trunk.start)
    asked = [
        place
        for leaf in range(trunk.low, trunk.high)
        for read in trie.reads[leaf]
        for place in _reads_between(read, path, trunk.start, trunk.stop)
    ]
    return PackedBatch(tokens_1T, depths_1T, None, asked)


def _write_sequence(
    trie: Trie, row: PackedSequence, tokens_T: Ints, depths_T: Ints, ends_T: Ints
) -> Iterator[ReadPositions]:
    """Write one sequence into its arrays and yield its reads."""
    # Position of the token at each depth, along the path that is being written.
    path = np.empty(int(trie.lengths[row.low : row.high].max()), dtype=np.int64)
    place, before = 0, row.start
    for leaf in range(row.low, row.high):
        length = int(trie.lengths[leaf])
        branch = row.start if leaf == row.low else int(trie.shared[leaf])
        # Leaves come in depth-first order (an Euler tour of the trie). When the path leaves at
        # depth `branch`, the subtrees of all deeper tokens of the previous path end here, at the
        # next free position: one assignment closes them all. Shallower tokens are ancestors of this
        # leaf too and stay open.
        ends_T[path[branch:before]] = place
        after = place + length - branch
        path[branch:length] = np.arange(place, after)
        tokens_T[place:after] = trie.leaves[leaf][branch:]
        depths_T[place:after] = np.arange(branch, length)
        place, before = after, length
        for read in trie.reads[leaf]:
            yield from _reads_between(read, path, row.start, length)
    # The last path closes everything that is still open.
    ends_T[path[row.start : before]] = place


def _reads_between(read: Read, path: Ints, start: int, stop: int) -> Iterator[ReadPositions]:
    """Yield the part of a read that lies between two depths, if any."""
    first, last = max(read.start, start), min(read.start + len(read.targets), stop)
    if first < last:
        targets = read.targets[first - read.start : last - read.start]
        yield ReadPositions(read.number, path[first:last].copy(), targets)
