"""Inputs of many requests as a trie of tokens, stored as its leaves in sorted order.

In that order a subtree is a range of leaves, and the lengths of the common prefixes of neighbours
describe all branches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bench.evaluation.text.requests import LoglikelihoodRequest

Ints: TypeAlias = NDArray[np.int64]


class Read(NamedTuple):
    """Targets that a request, given by its index, reads after the tokens from `start` on."""

    request: int
    start: int
    targets: Ints


class Trie:
    """Distinct inputs; none is a prefix of another. Each has the reads along its path.

    `shared[i]` is the number of tokens that leaf i has in common with leaf i - 1.
    """

    def __init__(self, requests: Sequence[LoglikelihoodRequest]) -> None:
        self.leaves: list[Ints] = []
        self.reads: list[list[Read]] = []
        for tokens, reads in _merge_prefixes(requests):
            self.leaves.append(tokens)
            self.reads.append(reads)
        common = [_common_prefix_length(left, right) for left, right in pairwise(self.leaves)]
        self.shared: Ints = np.array([0, *common][: len(self.leaves)], dtype=np.int64)
        self.lengths: Ints = np.array([len(leaf) for leaf in self.leaves], dtype=np.int64)
        # Tokens that each leaf adds to the one before it, summed: `size` is then two look-ups.
        self._added = np.concatenate([[0], np.cumsum(self.lengths - self.shared)])

    def __len__(self) -> int:
        return len(self.leaves)

    @property
    def tokens(self) -> int:
        """Number of tokens, each shared one counted once."""
        return int(self._added[-1])

    def size(self, low: int, high: int, depth: int) -> int:
        """Return the number of tokens of leaves `low` to `high` below a depth that they share."""
        # From `_added[low + 1]`, not `_added[low]`: the first leaf counts in full below `depth`,
        # since what it shares with the leaf before it is not in this range. Only the later leaves
        # count what they add.
        return int(self.lengths[low] - depth + self._added[high] - self._added[low + 1])

    def common(self, low: int, high: int) -> int:
        """Return the depth down to which leaves `low` to `high` are one path."""
        # In sorted order the first and the last leaf agree as far as the least agreeing neighbours.
        return int(self.shared[low + 1 : high].min() if high - low > 1 else self.lengths[low])

    def branches(self, low: int, high: int, depth: int) -> list[tuple[int, int]]:
        """Return the ranges of leaves that part at a depth, in order."""
        cuts = low + 1 + np.flatnonzero(self.shared[low + 1 : high] == depth)
        return list(pairwise([low, *cuts.tolist(), high]))


def _merge_prefixes(requests: Sequence[LoglikelihoodRequest]) -> list[tuple[Ints, list[Read]]]:
    """Sort inputs and drop those that are prefixes of others."""
    reads: dict[bytes, list[Read]] = defaultdict(list)
    for index, (inputs, targets) in enumerate(requests):
        start = len(inputs) - len(targets)
        # Each target is predicted at a token of its own. Without the check a request with too few
        # would be read at the end of its path, and one without any would get no result at all.
        if start < 0:
            raise ValueError(
                f"request {index} has {len(targets)} targets and only {len(inputs)} input tokens"
            )
        # Big-endian words sort as bytes like the tokens themselves, and bytes compare fast.
        key = np.array(inputs, dtype=">u4").tobytes()
        reads[key].append(Read(index, start, np.array(targets, dtype=np.int64)))
    keys = sorted(reads)
    leaves: list[tuple[Ints, list[Read]]] = []
    waiting: list[Read] = []
    for key, following in zip(keys, [*keys[1:], b""], strict=True):
        # The reads of a dropped prefix are kept for the leaf that extends it. In sorted order a
        # prefix stands directly before what extends it, so comparing with the next key is enough,
        # and reads wait until a key is not extended by its successor.
        waiting += reads[key]
        if not following.startswith(key):
            leaves.append((np.frombuffer(key, dtype=">u4").astype(np.int64), waiting))
            waiting = []
    return leaves


def _common_prefix_length(left: Ints, right: Ints) -> int:
    """Return the length of the common prefix of two inputs; neither is a prefix of the other."""
    short = min(len(left), len(right))
    # argmax of booleans is the first True, which exists because the inputs differ.
    return int(np.argmax(left[:short] != right[:short]))
