"""The prefix-sharing scorer: batches, logits to loglikelihoods.

The prefix-sharing scorer: packed batches through the network, log-likelihoods out.

Suffixes: R positions read, K targets.

From logits to log-likelihoods of targets, accumulated over batches.

Suffixes: R positions read, V vocabulary, K targets, several of which may share a position.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache

from bench.device.memory import is_out_of_memory
from bench.evaluation.batching import TokenBudget
from bench.evaluation.harness import BackendReport
from bench.evaluation.text.prefix.forward import Forward, extend_prefix, freeze_prefix
from bench.evaluation.text.prefix.packing import (
    DEFAULT_LIMITS,
    PackedBatch,
    PackedSequence,
    PackingLimits,
    PrefixGroup,
    ReadPositions,
    SharedPrefix,
    group_by_prefix,
    halve,
    pack,
    pack_prefix,
)
from bench.evaluation.text.prefix.trie import Trie
from bench.evaluation.text.requests import Loglikelihood, LoglikelihoodRequest, Loglikelihoods

MIN_WIDTH_RATIO = 0.75
"""Sequences narrower than this share of the widest wait for another batch: padding costs."""


class PrefixSharingScorer:
    """Scores requests with a network in which everything they share is computed once.

    `window` is the span of the network's narrowest sliding layer, None if there is none.
    """

    def __init__(
        self,
        forward: Forward,
        budget: TokenBudget,
        asked: BackendReport,
        window: int | None = None,
        limits: PackingLimits = DEFAULT_LIMITS,
    ) -> None:
        self._forward = forward
        self._budget = budget
        self._asked = asked
        self._window = window
        self._limits = limits

    def score(self, questions: Sequence[LoglikelihoodRequest]) -> Iterator[Loglikelihoods]:
        """Yield the responses of each batch; the widest batches of a prefix group come first."""
        if not questions:
            return
        trie = Trie(questions)
        self._asked.padded_tokens += sum(len(inputs) for inputs, _ in questions)
        groves = group_by_prefix(trie, self._limits, self._window)
        # A prefix alone may complete no request.
        yield from filter(None, self.walk(trie, groves, LoglikelihoodAccumulator(questions)))

    @torch.no_grad()
    def walk(
        self, trie: Trie, groves: Sequence[PrefixGroup], tally: LoglikelihoodAccumulator
    ) -> Iterator[Loglikelihoods]:
        """Send prefix groups through the network; a prefix is kept while a group may extend it."""
        trunks: dict[SharedPrefix | None, Cache | None] = {None: None}
        for grove in groves:
            trunk = grove.trunk
            if trunk is not None:
                # Groups come depth first, parents before children, so whatever is still to come
                # extends this prefix or one of its ancestors. Everything else can go: memory is
                # bounded by the depth of nesting, not by the number of prefixes.
                trunks = {kept: trunks[kept] for kept in _ancestors(trunk)}
                laid, cache = pack_prefix(trie, trunk), extend_prefix(trunks[trunk.parent])
                values = self._attempt(laid, cache)
                # A prefix is one path in one row; there is nothing left to split.
                if values is None:
                    raise self._budget.refuse(trunk.stop)
                yield tally.add(laid.asked, values)
                trunks[trunk] = freeze_prefix(cache)
            yield from self._rows(trie, grove.rows, trunks[trunk], tally)

    def _rows(
        self,
        trie: Trie,
        rows: Sequence[PackedSequence],
        cache: Cache | None,
        tally: LoglikelihoodAccumulator,
    ) -> Iterator[Loglikelihoods]:
        """Score sequences that follow one prefix; paths alone form batches without a tree mask."""
        for is_path in (True, False):
            waiting = deque(row for row in rows if row.is_path == is_path)
            while waiting:
                batch = self._next(trie, waiting)
                laid = pack(trie, batch)
                values = self._attempt(laid, cache)
                if values is None:
                    waiting.extendleft(reversed(self._smaller(batch)))
                else:
                    yield tally.add(laid.asked, values)

    def _next(self, trie: Trie, waiting: deque[PackedSequence]) -> list[PackedSequence]:
        """Take as many sequences of similar width as the budget allows, the widest first.

        Once memory has run out, sequences wider than the remaining budget are split.
        """
        # Not before: the budget is an estimate, and splitting repeats shared tokens.
        while self._asked.halved and waiting[0].size > self._budget.tokens:
            halves = halve(trie, waiting[0])
            if halves is None:
                break
            waiting.popleft()
            waiting.extendleft(reversed(halves))
        width = waiting[0].size
        batch = [waiting.popleft()]
        while waiting and (len(batch) + 1) * width <= self._budget.tokens:
            if waiting[0].size < MIN_WIDTH_RATIO * width:
                break
            batch.append(waiting.popleft())
        return batch

    def _smaller(self, batch: list[PackedSequence]) -> list[PackedSequence]:
        """Halve the budget and return the sequences to retry; a single path cannot be split."""
        tried = len(batch) * batch[0].size
        if len(batch) == 1 and batch[0].is_path:
            raise self._budget.refuse(tried)
        self._budget.halve(tried)
        self._asked.halved += 1
        return batch

    def _attempt(self, laid: PackedBatch, cache: Cache | None) -> NDArray[np.float64] | None:
        """Return None if memory ran out."""
        # A frame of its own, as in `bench.evaluation.batching`: the traceback must be gone before
        # memory is released.
        try:
            return self._read(laid, cache)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _read(self, laid: PackedBatch, cache: Cache | None) -> NDArray[np.float64]:
        """Return log-probabilities and greedy flags of all targets, [2, K], ordered as read."""
        none = [np.empty(0, dtype=np.int64)]  # a prefix may be computed for its cache alone
        places = [place.places for place in laid.asked] or none
        targets = [place.targets for place in laid.asked] or none
        # One row of logits per position, although many targets may read it: all choices of a
        # question are predicted from the same last token. `order_K` sorts targets by position, as
        # `target_logprobs` requires; assigning through it at the end is the inverse and restores
        # the order of the reads.
        read_R, back_K = np.unique(np.concatenate(places), return_inverse=True)
        order_K = np.argsort(back_K, kind="stable")
        logits_RV = self._forward(laid, torch.from_numpy(read_R), cache)
        self._asked.computed_tokens += laid.tokens_BT.size
        found_2K = target_logprobs(
            logits_RV,
            torch.from_numpy(back_K[order_K]),
            torch.from_numpy(np.concatenate(targets)[order_K]),
        )
        values_2K = np.empty_like(found_2K)
        values_2K[:, order_K] = found_2K
        return values_2K


def _ancestors(trunk: SharedPrefix) -> list[SharedPrefix | None]:
    """Return the parent of a prefix, its parent, and so on, ending with None."""
    found: list[SharedPrefix | None] = []
    parent = trunk.parent
    while parent is not None:
        found.append(parent)
        parent = parent.parent
    return [*found, None]


CHUNK = 512
"""Positions whose log-probabilities exist in float32 at one time."""


def target_logprobs(logits_RV: Tensor, row_K: Tensor, target_K: Tensor) -> NDArray[np.float64]:
    """Return log-probabilities and greedy flags, [2, K]; `row_K` must be sorted."""
    # Since `row_K` is sorted, the targets of a chunk of positions are one slice. Chunks bound the
    # float32 copy of the logits, which would otherwise be the largest tensor of the forward.
    found: list[Tensor] = [torch.empty(2, 0, device=logits_RV.device)]
    bounds = torch.searchsorted(row_K, torch.arange(0, len(logits_RV) + CHUNK, CHUNK)).tolist()
    parts = logits_RV.split(CHUNK)
    for number, (part_RV, low, high) in enumerate(zip(parts, bounds, bounds[1:], strict=False)):
        logp_RV = part_RV.float().log_softmax(-1)
        row_k = (row_K[low:high] - number * CHUNK).to(logp_RV.device)
        target_k = target_K[low:high].to(logp_RV.device)
        greedy_k = logp_RV.argmax(-1)[row_k] == target_k
        found.append(torch.stack([logp_RV[row_k, target_k], greedy_k.to(logp_RV.dtype)]))
    values_2K: NDArray[np.float64] = torch.cat(found, dim=1).cpu().double().numpy()
    return values_2K


class LoglikelihoodAccumulator:
    """Adds up the parts of each request's log-likelihood until the request is complete."""

    def __init__(self, questions: Sequence[LoglikelihoodRequest]) -> None:
        self._left = np.array([len(targets) for _, targets in questions])
        self._value = np.zeros(len(questions))
        self._greedy = np.ones(len(questions), dtype=bool)

    def add(self, asked: Sequence[ReadPositions], values_2K: NDArray[np.float64]) -> Loglikelihoods:
        """Add the targets of some reads, in their order; return the requests now complete."""
        if not asked:
            return []
        counts = np.array([len(place.targets) for place in asked])
        first = np.cumsum(counts) - counts
        value = np.add.reduceat(values_2K[0], first)
        greedy = np.logical_and.reduceat(values_2K[1] > 0, first)
        numbers = np.array([place.number for place in asked])
        # `+=` with an index array drops repetitions, but there are none: the path of a request is
        # in one sequence of a batch, and a prefix is a batch of its own.
        self._value[numbers] += value
        self._greedy[numbers] &= greedy
        self._left[numbers] -= counts
        whole = numbers[self._left[numbers] == 0]
        pairs = zip(self._value[whole].tolist(), self._greedy[whole].tolist(), strict=True)
        return [(n, Loglikelihood(*pair)) for n, pair in zip(whole.tolist(), pairs, strict=True)]
