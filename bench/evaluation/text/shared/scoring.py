"""Scoring questions by their shared beginnings, batch by batch.

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
"""A row narrower than this share of the widest is left for another batch: padding costs."""


class SharedScorer:
    """Answers questions with a network in which all that they share is computed once.

    `window` is how far the network's narrowest layer looks back, None for everything.
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
        """Yield the answers of each batch; the widest batches of a trunk come first."""
        if not questions:
            return
        trie = Trie(questions)
        self._asked.given += sum(len(inputs) for inputs, _ in questions)
        groves = cut(trie, self._limits, self._window)
        # A trunk by itself may answer nothing.
        yield from filter(None, self.walk(trie, groves, Tally(questions)))

    @torch.no_grad()
    def walk(self, trie: Trie, groves: Sequence[Grove], tally: Tally) -> Iterator[Answers]:
        """Send groves through the network; a trunk is kept while anything may stand on it."""
        trunks: dict[Trunk | None, Cache | None] = {None: None}
        for grove in groves:
            trunk = grove.trunk
            if trunk is not None:
                trunks = {kept: trunks[kept] for kept in _ancestors(trunk)}
                laid, cache = lay_trunk(trie, trunk), growing(trunks[trunk.parent])
                values = self._attempt(laid, cache)
                if values is None:
                    raise self._budget.refuse(trunk.stop)
                yield tally.add(laid.asked, values)
                trunks[trunk] = lent(cache)
            yield from self._rows(trie, grove.rows, trunks[trunk], tally)

    def _rows(
        self, trie: Trie, rows: Sequence[Row], cache: Cache | None, tally: Tally
    ) -> Iterator[Answers]:
        """Answer rows that stand on one trunk. Paths go apart: they need no mask of ours."""
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
        """Take as many rows of like width as the budget allows; the first is the widest.

        Once memory has run out, rows that are wider than what is left of the budget are split.
        """
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
        """Halve the budget and return the rows to try again; a single path cannot be."""
        tried = len(batch) * batch[0].size
        if len(batch) == 1 and batch[0].is_path:
            raise self._budget.refuse(tried)
        self._budget.halve(tried)
        self._asked.halved += 1
        return batch

    def _attempt(self, laid: Laid, cache: Cache | None) -> NDArray[np.float64] | None:
        """Return None when memory ran out; the failed attempt's tensors die with its frame."""
        try:
            return self._read(laid, cache)
        except RuntimeError as error:
            if not is_exhausted(error):
                raise
            return None

    def _read(self, laid: Laid, cache: Cache | None) -> NDArray[np.float64]:
        """Return log-probabilities and greedy flags of all targets, [2, K], in their order."""
        none = [np.empty(0, dtype=np.int64)]  # of a trunk only its keys and values may be wanted
        places = [place.places for place in laid.asked] or none
        targets = [place.targets for place in laid.asked] or none
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
    """Return a trunk's parent, that one's parent, and so on, down to none."""
    found: list[Trunk | None] = []
    parent = trunk.parent
    while parent is not None:
        found.append(parent)
        parent = parent.parent
    return [*found, None]
