"""Packing of a trie into sequences with tree attention, and the shared prefixes that precede them.

Attention is computed between all tokens of a sequence, so sequences are short unless their tokens
share much. A separate sequence repeats the tokens that its branch shared; if these are many, they
become a cached prefix.

Tokens of a sequence are in depth-first order, so the descendants of a token follow it directly. A
token is thus visible to the positions after it and before its `subtree_end`, which takes one
comparison instead of traversing the trie.

Suffixes: B sequences of a batch, T positions of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from bench.evaluation.text.prefix.trie import Ints, Read, Trie

MIN_WIDTH_RATIO = 0.75
"""Minimum width of a sequence, relative to the widest one in its batch, to limit padding."""


@dataclass(frozen=True)
class PackingLimits:
    """Maximum lengths of sequences and minimum length of a prefix, in tokens.

    `sequence` is the maximum length for unrelated paths, so that attention is a small part of the
    work; `branching_sequence` is the maximum length if a good part of the tokens is shared. A
    prefix of at least `min_prefix` tokens gets a separate forward.
    """

    # Attention is quadratic in the length of a sequence, the rest of a layer linear. Repeating a
    # prefix below `min_prefix` is cheaper than a separate forward, which loads all weights for a
    # few tokens, and after which every batch concatenates its keys and values.
    sequence: int = 256
    branching_sequence: int = 2048
    min_prefix: int = 32


DEFAULT_LIMITS = PackingLimits()


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """The tokens from depth `start` to `stop`, which leaves `low` to `high` share."""

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

    @classmethod
    def of(cls, trie: Trie, low: int, high: int, start: int) -> PackedSequence:
        """Return the sequence of a range of leaves that share all tokens above `start`."""
        return cls(low, high, start, trie.size(low, high, start))

    @property
    def is_path(self) -> bool:
        """Whether it has no branches, so that the network's own causal mask is correct for it."""
        return self.high - self.low == 1


@dataclass
class PrefixGroup:
    """Packed sequences that follow one shared prefix, or none."""

    prefix: SharedPrefix | None
    sequences: list[PackedSequence] = field(default_factory=list)


def group_by_prefix(
    trie: Trie, limits: PackingLimits = DEFAULT_LIMITS, window: int | None = None
) -> list[PrefixGroup]:
    """Divide a trie into prefix groups; the parent of a prefix precedes the prefix itself.

    Sequences longer than the sliding `window` are packed alone: the model's own mask is then
    correct, while the tree mask does not support windows.
    """
    root = PrefixGroup(None)
    groups = [root]
    for low, high in _ranges_within_window(trie, window, root):
        _cut_range(trie, limits, (low, high, root), groups)
    for group in groups:
        # Widest first: the scorer batches neighbours, so the batch most likely to run out of memory
        # comes first.
        merged = _merge_neighbours(trie, group.sequences, limits, window)
        group.sequences = sorted(merged, key=lambda sequence: -sequence.size)
    return groups


def batch_length(sizes: Iterable[int], budget: int) -> int:
    """Return the number of next sequences that form a batch, widest first and at least one.

    `sizes` are their numbers of tokens in descending order, and `budget` is the maximum number of
    tokens in a batch, including padding.
    """
    following = iter(sizes)
    widest, count = next(following), 1
    for size in following:
        if (count + 1) * widest > budget or size < MIN_WIDTH_RATIO * widest:
            break
        count += 1
    return count


def halve(trie: Trie, sequence: PackedSequence) -> tuple[PackedSequence, PackedSequence] | None:
    """Return two halves of a packed sequence, or None if it is a single path."""
    if sequence.is_path:
        return None
    low, high, start = sequence.low, sequence.high, sequence.start
    middle = (low + high) // 2
    of = PackedSequence.of
    return of(trie, low, middle, start), of(trie, middle, high, start)


def _ranges_within_window(
    trie: Trie, window: int | None, root: PrefixGroup
) -> Iterator[tuple[int, int]]:
    """Yield the ranges of leaves that fit the window; longer leaves become sequences at once."""
    low = 0
    for leaf in range(len(trie)):
        if window is not None and trie.lengths[leaf] > window:
            root.sequences.append(PackedSequence.of(trie, leaf, leaf + 1, 0))
            if low < leaf:
                yield low, leaf
            low = leaf + 1
    if low < len(trie):
        yield low, len(trie)


def _cut_range(
    trie: Trie,
    limits: PackingLimits,
    whole: tuple[int, int, PrefixGroup],
    groups: list[PrefixGroup],
) -> None:
    """Divide a range of a group's leaves into sequences, and into groups with a longer prefix."""
    # A stack instead of recursion, because tries are as deep as prompts: thousands of tokens.
    pending = [whole]
    while pending:
        low, high, group = pending.pop()
        start = group.prefix.stop if group.prefix else 0
        size = trie.size(low, high, start)
        common = trie.common(low, high)
        is_deep = common - start >= limits.min_prefix
        # A long sequence has quadratic attention between branches that do not attend to each other;
        # dividing it repeats their common tokens or caches them. Beyond `limits.sequence`, it is
        # not divided only if at least a quarter of it is common to all of its paths.
        is_shared = 4 * (common - start) >= size
        fits = size <= limits.sequence or (
            is_deep and size <= limits.branching_sequence and is_shared
        )
        if fits or high - low == 1:
            group.sequences.append(PackedSequence.of(trie, low, high, start))
            continue
        if is_deep:
            group = PrefixGroup(SharedPrefix(group.prefix, low, high, start, common))
            groups.append(group)
        branches = trie.branches(low, high, common)
        # Reversed, so that branches leave the stack in order. So groups are appended depth first,
        # which allows the scorer to drop prefixes that no later group can need.
        pending += [(*branch, group) for branch in reversed(branches)]


def _merge_neighbours(
    trie: Trie, sequences: list[PackedSequence], limits: PackingLimits, window: int | None
) -> Iterator[PackedSequence]:
    """Merge neighbours that are short together; their common tokens are then computed once."""
    waiting: PackedSequence | None = None
    for sequence in sorted(sequences, key=lambda sequence: sequence.low):
        if waiting is None:
            waiting = sequence
            continue
        # Only neighbours can be merged, because a sequence is a range of sorted leaves. The window
        # is checked again, because a leaf that exceeds it may be among the neighbours and must stay
        # alone.
        low, high = waiting.low, sequence.high
        merged = PackedSequence.of(trie, low, high, sequence.start)
        exceeds = window is not None and trie.lengths[low:high].max() > window
        if waiting.high == sequence.low and merged.size <= limits.sequence and not exceeds:
            waiting = merged
        else:
            yield waiting
            waiting = sequence
    if waiting is not None:
        yield waiting


class ReadPositions(NamedTuple):
    """Part of a request: targets, and the positions of a sequence or batch that predict them."""

    request: int
    positions: Ints
    targets: Ints


class PackedBatch(NamedTuple):
    """Packed sequences side by side; positions of reads are indices into the flattened batch.

    `subtree_end_BT` is None if no sequence branches. Padding is on the right, where it attends only
    to itself and no other token attends to it.
    """

    tokens_BT: Ints
    depths_BT: Ints
    subtree_end_BT: Ints | None
    reads: list[ReadPositions]


def pack(trie: Trie, sequences: Sequence[PackedSequence]) -> PackedBatch:
    """Pack sequences that follow one prefix into a batch."""
    width = max(sequence.size for sequence in sequences)
    start = sequences[0].start
    shape = (len(sequences), width)
    tokens_BT = np.zeros(shape, dtype=np.int64)
    depths_BT = np.broadcast_to(start + np.arange(width), shape).copy()
    # Padding keeps this default, its own position + 1, so that it attends to itself: a softmax over
    # nothing would be NaN.
    subtree_end_BT = np.broadcast_to(1 + np.arange(width), shape).copy()
    reads: list[ReadPositions] = []
    for row, sequence in enumerate(sequences):
        arrays = (tokens_BT[row], depths_BT[row], subtree_end_BT[row])
        reads += [
            read._replace(positions=read.positions + row * width)
            for read in _write_sequence(trie, sequence, *arrays)
        ]
    branches = any(not sequence.is_path for sequence in sequences)
    return PackedBatch(tokens_BT, depths_BT, subtree_end_BT if branches else None, reads)


def pack_prefix(trie: Trie, prefix: SharedPrefix) -> PackedBatch:
    """Pack the tokens of a prefix as one sequence, with all reads of its leaves inside it."""
    tokens_1T = trie.leaves[prefix.low][None, prefix.start : prefix.stop]
    depths_1T = np.arange(prefix.start, prefix.stop)[None]
    path = np.arange(-prefix.start, prefix.stop - prefix.start)
    reads = [
        part
        for leaf in range(prefix.low, prefix.high)
        for read in trie.reads[leaf]
        for part in _reads_between(read, path, prefix.start, prefix.stop)
    ]
    return PackedBatch(tokens_1T, depths_1T, None, reads)


def _write_sequence(
    trie: Trie, sequence: PackedSequence, tokens_T: Ints, depths_T: Ints, ends_T: Ints
) -> Iterator[ReadPositions]:
    """Write one sequence into its arrays and yield its reads."""
    low, high, start = sequence.low, sequence.high, sequence.start
    # Position of the token at each depth, along the current path.
    path = np.empty(int(trie.lengths[low:high].max()), dtype=np.int64)
    position, previous_length = 0, start
    for leaf in range(low, high):
        length = int(trie.lengths[leaf])
        branch = start if leaf == low else int(trie.shared[leaf])
        # Leaves come in depth-first order (an Euler tour of the trie). If the path changes at depth
        # `branch`, the subtrees of all deeper tokens of the previous path end here, at the next
        # free position: one assignment sets all of them. Shallower tokens are also ancestors of
        # this leaf and stay open.
        ends_T[path[branch:previous_length]] = position
        after = position + length - branch
        path[branch:length] = np.arange(position, after)
        tokens_T[position:after] = trie.leaves[leaf][branch:]
        depths_T[position:after] = np.arange(branch, length)
        position, previous_length = after, length
        for read in trie.reads[leaf]:
            yield from _reads_between(read, path, start, length)
    # The last path ends everything that is still open.
    ends_T[path[start:previous_length]] = position


def _reads_between(read: Read, path: Ints, start: int, stop: int) -> Iterator[ReadPositions]:
    """Yield the part of a read between two depths, if any."""
    first, last = max(read.start, start), min(read.start + len(read.targets), stop)
    if first < last:
        targets = read.targets[first - read.start : last - read.start]
        yield ReadPositions(read.request, path[first:last].copy(), targets)
