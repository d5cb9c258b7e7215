"""The prefix-sharing scorer: runs packed batches and returns log-likelihoods.

Suffixes: R positions read, V vocabulary, K targets, several of which may share a position.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.evaluation.batching import TokenBudget, attempt
from bench.evaluation.harness import BackendReport
from bench.evaluation.networks import KeyValueCache
from bench.evaluation.text.prefix.forward import Forward, extend_prefix, freeze_prefix
from bench.evaluation.text.prefix.packing import (
    DEFAULT_LIMITS,
    PackedBatch,
    PackedSequence,
    PackingLimits,
    PrefixGroup,
    ReadPositions,
    SharedPrefix,
    batch_length,
    group_by_prefix,
    halve,
    pack,
    pack_prefix,
)
from bench.evaluation.text.prefix.trie import Trie
from bench.evaluation.text.requests import Loglikelihood, LoglikelihoodRequest, Loglikelihoods

CHUNK = 512
"""Maximum number of positions whose log-probabilities exist in float32 at a time."""


class PrefixSharingScorer:
    """Scores requests with a network, computing common prefixes only once.

    `window` is the size of the network's smallest sliding window, None if there is none.
    """

    def __init__(
        self,
        forward: Forward,
        budget: TokenBudget,
        report: BackendReport,
        window: int | None = None,
        limits: PackingLimits = DEFAULT_LIMITS,
    ) -> None:
        self._forward = forward
        self._budget = budget
        self._report = report
        self._window = window
        self._limits = limits

    def score(self, requests: Sequence[LoglikelihoodRequest]) -> Iterator[Loglikelihoods]:
        """Yield the results of each batch; the widest batches of a prefix group come first."""
        if not requests:
            return
        trie = Trie(requests)
        self._report.padded_tokens += sum(len(inputs) for inputs, _ in requests)
        groups = group_by_prefix(trie, self._limits, self._window)
        # A batch with only a prefix may complete no request.
        yield from filter(None, self.walk(trie, groups, LoglikelihoodAccumulator(requests)))

    @torch.no_grad()
    def walk(
        self, trie: Trie, groups: Sequence[PrefixGroup], accumulator: LoglikelihoodAccumulator
    ) -> Iterator[Loglikelihoods]:
        """Run prefix groups through the network; a prefix is kept while a group may extend it."""
        caches: dict[SharedPrefix | None, KeyValueCache | None] = {None: None}
        for group in groups:
            prefix = group.prefix
            if prefix is not None:
                # Groups come depth first, parents before children, so later groups extend this
                # prefix or one of its ancestors. All others can be dropped: memory is limited by
                # the depth of nesting instead of the number of prefixes.
                caches = {kept: caches[kept] for kept in _ancestors(prefix)}
                batch, cache = pack_prefix(trie, prefix), extend_prefix(caches[prefix.parent])
                values = attempt(partial(self._read, batch, cache))
                # A prefix is one path in one row and cannot be split.
                if values is None:
                    raise self._budget.out_of_memory_error(prefix.stop)
                yield accumulator.add(batch.reads, values)
                caches[prefix] = freeze_prefix(cache)
            yield from self._score_group(trie, group, caches[prefix], accumulator)

    def _score_group(
        self,
        trie: Trie,
        group: PrefixGroup,
        cache: KeyValueCache | None,
        accumulator: LoglikelihoodAccumulator,
    ) -> Iterator[Loglikelihoods]:
        """Score sequences that follow one prefix; paths get batches without a tree mask."""
        for is_path in (True, False):
            waiting = deque(each for each in group.sequences if each.is_path == is_path)
            while waiting:
                sequences = self._next_batch(trie, waiting)
                batch = pack(trie, sequences)
                values = attempt(partial(self._read, batch, cache))
                if values is None:
                    self._halve_budget(sequences)
                    waiting.extendleft(reversed(sequences))
                else:
                    yield accumulator.add(batch.reads, values)

    def _next_batch(self, trie: Trie, waiting: deque[PackedSequence]) -> list[PackedSequence]:
        """Take as many sequences of similar width as the budget allows, widest first.

        After memory has run out, sequences wider than the reduced budget are split.
        """
        # Not before, because the budget is an estimate and splitting repeats shared tokens.
        while self._report.halved and waiting[0].size > self._budget.tokens:
            halves = halve(trie, waiting[0])
            if halves is None:
                break
            waiting.popleft()
            waiting.extendleft(reversed(halves))
        count = batch_length((each.size for each in waiting), self._budget.tokens)
        return [waiting.popleft() for _ in range(count)]

    def _halve_budget(self, batch: list[PackedSequence]) -> None:
        """Halve the budget after a batch that did not fit; a single path cannot be split."""
        tried = len(batch) * batch[0].size
        if len(batch) == 1 and batch[0].is_path:
            raise self._budget.out_of_memory_error(tried)
        self._budget.halve(tried)
        self._report.halved += 1

    def _read(self, batch: PackedBatch, cache: KeyValueCache | None) -> NDArray[np.float64]:
        """Return log-probabilities and greedy flags of all targets, [2, K], ordered as read."""
        none = [np.empty(0, dtype=np.int64)]  # A prefix may be computed only for its cache.
        positions = [read.positions for read in batch.reads] or none
        targets = [read.targets for read in batch.reads] or none
        # One row of logits per position, even if many targets use it: all choices of a question are
        # predicted from the same last token. `order_K` sorts targets by position, as required by
        # `target_logprobs`; assigning through it at the end is the inverse and restores the order
        # of the reads.
        read_R, row_K = np.unique(np.concatenate(positions), return_inverse=True)
        order_K = np.argsort(row_K, kind="stable")
        logits_RV = self._forward(batch, torch.from_numpy(read_R), cache)
        self._report.computed_tokens += batch.tokens_BT.size
        sorted_2K = target_logprobs(
            logits_RV,
            torch.from_numpy(row_K[order_K]),
            torch.from_numpy(np.concatenate(targets)[order_K]),
        )
        values_2K = np.empty_like(sorted_2K)
        values_2K[:, order_K] = sorted_2K
        return values_2K


def _ancestors(prefix: SharedPrefix) -> list[SharedPrefix | None]:
    """Return the parent of a prefix, its parent, and so on, ending with None."""
    ancestors: list[SharedPrefix | None] = []
    parent = prefix.parent
    while parent is not None:
        ancestors.append(parent)
        parent = parent.parent
    return [*ancestors, None]


def target_logprobs(logits_RV: Tensor, row_K: Tensor, target_K: Tensor) -> NDArray[np.float64]:
    """Return log-probabilities and greedy flags, [2, K]; `row_K` must be sorted."""
    # Because `row_K` is sorted, the targets of a chunk of positions are one slice. Chunks limit the
    # float32 copy of the logits, which would otherwise be the largest tensor of the forward.
    chunks: list[Tensor] = [torch.empty(2, 0, device=logits_RV.device)]
    bounds = torch.searchsorted(row_K, torch.arange(0, len(logits_RV) + CHUNK, CHUNK)).tolist()
    parts = logits_RV.split(CHUNK)
    for chunk, (part_RV, low, high) in enumerate(zip(parts, bounds, bounds[1:], strict=False)):
        logp_RV = part_RV.float().log_softmax(-1)
        row_k = (row_K[low:high] - chunk * CHUNK).to(logp_RV.device)
        target_k = target_K[low:high].to(logp_RV.device)
        greedy_k = logp_RV.argmax(-1)[row_k] == target_k
        chunks.append(torch.stack([logp_RV[row_k, target_k], greedy_k.to(logp_RV.dtype)]))
    values_2K: NDArray[np.float64] = torch.cat(chunks, dim=1).cpu().double().numpy()
    return values_2K


class LoglikelihoodAccumulator:
    """Sums the parts of each request's log-likelihood until the request is complete."""

    def __init__(self, requests: Sequence[LoglikelihoodRequest]) -> None:
        self._remaining = np.array([len(targets) for _, targets in requests])
        self._value = np.zeros(len(requests))
        self._greedy = np.ones(len(requests), dtype=bool)

    def add(self, reads: Sequence[ReadPositions], values_2K: NDArray[np.float64]) -> Loglikelihoods:
        """Add the targets of some reads, in order; return the requests that are now complete."""
        if not reads:
            return []
        counts = np.array([len(read.targets) for read in reads])
        first = np.cumsum(counts) - counts
        value = np.add.reduceat(values_2K[0], first)
        greedy = np.logical_and.reduceat(values_2K[1] > 0, first)
        requests = np.array([read.request for read in reads])
        # `+=` with an index array ignores repetitions, but there are none: the path of a request is
        # in one sequence of a batch, and a prefix is a separate batch.
        self._value[requests] += value
        self._greedy[requests] &= greedy
        self._remaining[requests] -= counts
        done = requests[self._remaining[requests] == 0]
        pairs = zip(self._value[done].tolist(), self._greedy[done].tolist(), strict=True)
        return [(n, Loglikelihood(*pair)) for n, pair in zip(done.tolist(), pairs, strict=True)]
