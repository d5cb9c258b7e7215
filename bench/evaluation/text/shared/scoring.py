"""The prefix-sharing scorer: packed batches through the network, log-likelihoods out.

Suffixes: R positions read, K targets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache

from bench.device.memory import is_exhausted
from bench.evaluation.budget import TokenBudget
from bench.evaluation.engine import Asked
from bench.evaluation.text.question import Answers, Question
from bench.evaluation.text.shared.forward import Forward
from bench.evaluation.text.shared.groves import LIMITS, Grove, Limits, Row, Trunk, cut, split
from bench.evaluation.text.shared.reading import Tally, targets_read
from bench.evaluation.text.shared.rows import Laid, lay, lay_trunk
from bench.evaluation.text.shared.trie import Trie
from bench.evaluation.text.shared.trunk import growing, lent

LIKE = 0.75
"""Sequences narrower than this share of the widest wait for another batch: padding costs."""


class SharedScorer:
    """Scores requests with a network in which everything they share is computed once.

    `window` is the span of the network's narrowest sliding layer, None if there is none.
    """

    def __init__(
        self,
        forward: Forward,
        budget: TokenBudget,
        asked: Asked,
        window: int | None = None,
        limits: Limits = LIMITS,
    ) -> None:
        self._forward = forward
        self._budget = budget
        self._asked = asked
        self._window = window
        self._limits = limits

    def score(self, questions: Sequence[Question]) -> Iterator[Answers]:
        """Yield the responses of each batch; the widest batches of a prefix group come first."""
        if not questions:
            return
        trie = Trie(questions)
        self._asked.given += sum(len(inputs) for inputs, _ in questions)
        groves = cut(trie, self._limits, self._window)
        # A prefix alone may complete no request.
        yield from filter(None, self.walk(trie, groves, Tally(questions)))

    @torch.no_grad()
    def walk(self, trie: Trie, groves: Sequence[Grove], tally: Tally) -> Iterator[Answers]:
        """Send prefix groups through the network; a prefix is kept while a group may extend it."""
        trunks: dict[Trunk | None, Cache | None] = {None: None}
        for grove in groves:
            trunk = grove.trunk
            if trunk is not None:
                # Groups come depth first, parents before children, so whatever is still to come
                # extends this prefix or one of its ancestors. Everything else can go: memory is
                # bounded by the depth of nesting, not by the number of prefixes.
                trunks = {kept: trunks[kept] for kept in _ancestors(trunk)}
                laid, cache = lay_trunk(trie, trunk), growing(trunks[trunk.parent])
                values = self._attempt(laid, cache)
                # A prefix is one path in one row; there is nothing left to split.
                if values is None:
                    raise self._budget.refuse(trunk.stop)
                yield tally.add(laid.asked, values)
                trunks[trunk] = lent(cache)
            yield from self._rows(trie, grove.rows, trunks[trunk], tally)

    def _rows(
        self, trie: Trie, rows: Sequence[Row], cache: Cache | None, tally: Tally
    ) -> Iterator[Answers]:
        """Score sequences that follow one prefix; paths alone form batches without a tree mask."""
        for is_path in (True, False):
            waiting = deque(row for row in rows if row.is_path == is_path)
            while waiting:
                batch = self._next(trie, waiting)
                laid = lay(trie, batch)
                values = self._attempt(laid, cache)
                if values is None:
                    waiting.extendleft(reversed(self._smaller(batch)))
                else:
                    yield tally.add(laid.asked, values)

    def _next(self, trie: Trie, waiting: deque[Row]) -> list[Row]:
        """Take as many sequences of similar width as the budget allows, the widest first.

        Once memory has run out, sequences wider than the remaining budget are split.
        """
        # Not before: the budget is an estimate, and splitting repeats shared tokens.
        while self._asked.halved and waiting[0].size > self._budget.tokens:
            halves = split(trie, waiting[0])
            if halves is None:
                break
            waiting.popleft()
            waiting.extendleft(reversed(halves))
        width = waiting[0].size
        batch = [waiting.popleft()]
        while waiting and (len(batch) + 1) * width <= self._budget.tokens:
            if waiting[0].size < LIKE * width:
                break
            batch.append(waiting.popleft())
        return batch

    def _smaller(self, batch: list[Row]) -> list[Row]:
        """Halve the budget and return the sequences to retry; a single path cannot be split."""
        tried = len(batch) * batch[0].size
        if len(batch) == 1 and batch[0].is_path:
            raise self._budget.refuse(tried)
        self._budget.halve(tried)
        self._asked.halved += 1
        return batch

    def _attempt(self, laid: Laid, cache: Cache | None) -> NDArray[np.float64] | None:
        """Return None if memory ran out."""
        # A frame of its own, as in `bench.evaluation.batching`: the traceback must be gone before
        # memory is released.
        try:
            return self._read(laid, cache)
        except RuntimeError as error:
            if not is_exhausted(error):
                raise
            return None

    def _read(self, laid: Laid, cache: Cache | None) -> NDArray[np.float64]:
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
        self._asked.computed += laid.tokens_BT.size
        found_2K = targets_read(
            logits_RV,
            torch.from_numpy(back_K[order_K]),
            torch.from_numpy(np.concatenate(targets)[order_K]),
        )
        values_2K = np.empty_like(found_2K)
        values_2K[:, order_K] = found_2K
        return values_2K


def _ancestors(trunk: Trunk) -> list[Trunk | None]:
    """Return the parent of a prefix, its parent, and so on, ending with None."""
    found: list[Trunk | None] = []
    parent = trunk.parent
    while parent is not None:
        found.append(parent)
        parent = parent.parent
    return [*found, None]
