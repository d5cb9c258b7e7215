"""Packed sequences as arrays: tokens, depths, subtree ends, and the positions to read.

Tokens are written depth first, so the descendants of a token follow it directly. A token is thus
visible to the positions after it and before its `subtree_end`: one comparison instead of a walk
through the trie.

Suffixes: B sequences of a batch, T positions of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bench.evaluation.text.shared.groves import Row, Trunk
from bench.evaluation.text.shared.trie import Ints, Read, Trie


class Place(NamedTuple):
    """A part of a request: targets, and the positions of a sequence or batch that predict them."""

    number: int
    places: Ints
    targets: Ints


class Laid(NamedTuple):
    """Packed sequences side by side; positions of reads count through the flattened batch.

    `ends_BT` is None if no sequence branches. Padding is on the right, where it sees itself only
    and is seen by nothing.
    """

    tokens_BT: Ints
    depths_BT: Ints
    ends_BT: Ints | None
    asked: list[Place]


def lay(trie: Trie, rows: Sequence[Row]) -> Laid:
    """Pack sequences that follow one prefix into a batch."""
    width = max(row.size for row in rows)
    start = rows[0].start
    shape = (len(rows), width)
    tokens_BT = np.zeros(shape, dtype=np.int64)
    depths_BT = np.broadcast_to(start + np.arange(width), shape).copy()
    # Padding keeps this default, its own position + 1: it sees itself, since a softmax over nothing
    # would be NaN.
    ends_BT = np.broadcast_to(1 + np.arange(width), shape).copy()
    asked: list[Place] = []
    for number, row in enumerate(rows):
        written = (tokens_BT[number], depths_BT[number], ends_BT[number])
        before = number * width
        asked += [
            place._replace(places=place.places + before) for place in _write(trie, row, *written)
        ]
    branches = any(not row.is_path for row in rows)
    return Laid(tokens_BT, depths_BT, ends_BT if branches else None, asked)


def lay_trunk(trie: Trie, trunk: Trunk) -> Laid:
    """Pack the tokens of a prefix as one sequence, with all reads that its leaves have in it."""
    tokens_1T = trie.leaves[trunk.low][None, trunk.start : trunk.stop]
    depths_1T = np.arange(trunk.start, trunk.stop)[None]
    path = np.arange(-trunk.start, trunk.stop - trunk.start)
    asked = [
        place
        for leaf in range(trunk.low, trunk.high)
        for read in trie.reads[leaf]
        for place in _between(read, path, trunk.start, trunk.stop)
    ]
    return Laid(tokens_1T, depths_1T, None, asked)


def _write(trie: Trie, row: Row, tokens_T: Ints, depths_T: Ints, ends_T: Ints) -> Iterator[Place]:
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
            yield from _between(read, path, row.start, length)
    # The last path closes everything that is still open.
    ends_T[path[row.start : before]] = place


def _between(read: Read, path: Ints, start: int, stop: int) -> Iterator[Place]:
    """Yield the part of a read that lies between two depths, if any."""
    first, last = max(read.start, start), min(read.start + len(read.targets), stop)
    if first < last:
        targets = read.targets[first - read.start : last - read.start]
        yield Place(read.number, path[first:last].copy(), targets)
