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
    """Targets of a request, given by its index, that are predicted after tokens from `start` on."""

    request: int
    start: int
    targets: Ints


class Trie:
    """Distinct inputs, none of which is a prefix of another. Each has the reads along its path.

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
        # Cumulative number of tokens that each leaf adds, so that `size` takes two lookups.
        self._added = np.concatenate([[0], np.cumsum(self.lengths - self.shared)])

    def __len__(self) -> int:
        return len(self.leaves)

    @property
    def tokens(self) -> int:
        """Number of tokens, with shared ones counted once."""
        return int(self._added[-1])

    def size(self, low: int, high: int, depth: int) -> int:
        """Return the number of tokens of leaves `low` to `high` below a depth that they share."""
        # From `_added[low + 1]` instead of `_added[low]`: the first leaf counts in full below
        # `depth`, because the leaf before it is not in this range.
        return int(self.lengths[low] - depth + self._added[high] - self._added[low + 1])

    def common(self, low: int, high: int) -> int:
        """Return the depth down to which leaves `low` to `high` are a single path."""
        # In sorted order, the first and last leaves share as much as the least similar neighbours.
        return int(self.shared[low + 1 : high].min() if high - low > 1 else self.lengths[low])

    def branches(self, low: int, high: int, depth: int) -> list[tuple[int, int]]:
        """Return the ranges of leaves that separate at a depth, in order."""
        cuts = low + 1 + np.flatnonzero(self.shared[low + 1 : high] == depth)
        return list(pairwise([low, *cuts.tolist(), high]))


def _merge_prefixes(requests: Sequence[LoglikelihoodRequest]) -> list[tuple[Ints, list[Read]]]:
    """Sort inputs and drop those that are prefixes of others."""
    reads: dict[bytes, list[Read]] = defaultdict(list)
    for index, (inputs, targets) in enumerate(requests):
        start = len(inputs) - len(targets)
        # Each target is predicted at its own token. Without this check, a request with too few
        # tokens would be read at the end of its path, and one without any would get no result.
        if start < 0:
            raise ValueError(
                f"request {index} has {len(targets)} targets and only {len(inputs)} input tokens"
            )
        # Big-endian words sort as bytes in the same order as tokens, and bytes compare fast.
        key = np.array(inputs, dtype=">u4").tobytes()
        reads[key].append(Read(index, start, np.array(targets, dtype=np.int64)))
    keys = sorted(reads)
    leaves: list[tuple[Ints, list[Read]]] = []
    waiting: list[Read] = []
    for key, following in zip(keys, [*keys[1:], b""], strict=True):
        # The reads of a dropped prefix belong to the leaf that extends it. In sorted order a prefix
        # directly precedes its extensions, so comparing with the next key suffices, and reads are
        # kept until a key is not extended by its successor.
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
