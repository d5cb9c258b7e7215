"""Rows written out: which token is where, what it may see, and where the reads are.

Depth first, a token's descendants follow it directly. So a token is seen by all that come after it
and before its `end`, which is one comparison instead of a walk through the trie.

Suffixes: B rows of a batch, T places of the widest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bench.evaluation.text.shared.groves import Row, Trunk
from bench.evaluation.text.shared.trie import Ints, Read, Trie


class Place(NamedTuple):
    """A part of a question: the targets after the tokens at some places of a row or a batch."""

    number: int
    places: Ints
    targets: Ints


class Laid(NamedTuple):
    """Rows side by side. `ends_BT` is None where no row branches; places count through the batch.

    Padding is at the end of a row, where it sees itself and nobody sees it.
    """

    tokens_BT: Ints
    depths_BT: Ints
    ends_BT: Ints | None
    asked: list[Place]


def lay(trie: Trie, rows: Sequence[Row]) -> Laid:
    """Write rows that stand on one trunk side by side."""
    width = max(row.size for row in rows)
    start = rows[0].start
    shape = (len(rows), width)
    tokens_BT = np.zeros(shape, dtype=np.int64)
    depths_BT = np.broadcast_to(start + np.arange(width), shape).copy()
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
    """Write a trunk's tokens as one row, with the reads that all its leaves have in it."""
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
    """Write one row's tokens into its places and yield its reads."""
    # Where the token of each depth is on the path that is being written.
    path = np.empty(int(trie.lengths[row.low : row.high].max()), dtype=np.int64)
    place, before = 0, row.start
    for leaf in range(row.low, row.high):
        length = int(trie.lengths[leaf])
        branch = row.start if leaf == row.low else int(trie.shared[leaf])
        ends_T[path[branch:before]] = place
        after = place + length - branch
        path[branch:length] = np.arange(place, after)
        tokens_T[place:after] = trie.leaves[leaf][branch:]
        depths_T[place:after] = np.arange(branch, length)
        place, before = after, length
        for read in trie.reads[leaf]:
            yield from _between(read, path, row.start, length)
    ends_T[path[row.start : before]] = place


def _between(read: Read, path: Ints, start: int, stop: int) -> Iterator[Place]:
    """Yield the part of a read that lies between two depths, if there is one."""
    first, last = max(read.start, start), min(read.start + len(read.targets), stop)
    if first < last:
        targets = read.targets[first - read.start : last - read.start]
        yield Place(read.number, path[first:last].copy(), targets)
