"""What a model has answered already, so that a killed run goes on where it stopped.

This is the one seam between the harnesses' adapters and whatever computes: an adapter names its
requests by keys and says how those that are not known are scored; answers are kept batch by
batch as they come. A memory belongs to one run and one state of the network's weights (its
journal's identity), so a key only has to tell the requests of that run apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from bench.evaluation.batches import Batches
    from bench.progress import Progress
    from bench.records.journal import Journal

Item = TypeVar("Item")
Answers = Iterable[tuple[int, Any]]
"""Answers of one batch with the places of their requests; an answer is JSON and no tuple."""

Score = Callable[[list[int]], Iterable[Answers]]
"""Answers the requests at the given places, batch by batch, in any order."""


def key(*parts: Any) -> str:
    """Return a name for a request: a hash of everything that tells it from others."""
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()


class Memory:
    """Answers by key: those of a journal, and those that are given from now on."""

    def __init__(self, journal: Journal | None = None) -> None:
        from bench.evaluation.ranks import joined

        self._journal = journal
        entries = journal.entries if journal else []
        own = [pair for batch in entries for pair in batch]
        # All processes must miss the same, for they divide it among themselves.
        self._known: dict[str, Any] = dict(joined().together(own))

    def answers(self, keys: Sequence[str], score: Score, progress: Progress) -> list[Any]:
        """Return the answer to every key; only those that are not known are scored, each once."""
        places = {name: place for place, name in reversed(list(enumerate(keys)))}
        missing = sorted(place for name, place in places.items() if name not in self._known)
        progress.total(len(places))
        progress.step(len(places) - len(missing))
        for batch in score(missing):
            given = [(keys[place], answer) for place, answer in batch]
            if self._journal is not None and given:
                self._journal.append(given)
            self._known.update(given)
            progress.step(len(given))
        return [self._known[name] for name in keys]

    def batched(
        self,
        keys: Sequence[str],
        items: Sequence[Item],
        sizes: Sequence[int],
        batches: Batches,
        work: Callable[[Sequence[Item]], list[Any]],
        progress: Progress,
    ) -> list[Any]:
        """Return `answers` to items that are worked through in their order.

        Processes that evaluate together divide them by `sizes`, and exchange answers at the end.
        What a killed run left is a beginning of that order, so the batches of the one that goes on
        are those that it would have had, down to the last bit.
        """
        from bench.evaluation.ranks import joined

        def own(mine: list[int]) -> Iterator[list[tuple[int, Any]]]:
            places = iter(mine)
            for answers in batches.each([items[place] for place in mine], work):
                yield [(place, answer) for answer, place in zip(answers, places, strict=False)]

        def score(missing: list[int]) -> Iterable[Answers]:
            return joined().spread(missing, [sizes[place] for place in missing], own)

        return self.answers(keys, score, progress)
