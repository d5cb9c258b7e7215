"""Response cache that lets an interrupted evaluation resume; all harness adapters go through it.

An adapter names its requests by keys and supplies a function that computes the responses that are
missing; responses are stored batch by batch as they arrive. A cache belongs to one run and one
state of the weights (the identity of its journal), so a key need only distinguish the requests of
that run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from bench.evaluation.batching import AdaptiveBatches
    from bench.records.journal import Journal
    from bench.ui import Progress

Item = TypeVar("Item")
Responses = Iterable[tuple[int, Any]]
"""Responses of one batch with the indices of their requests; a response is JSON, not a tuple."""
ComputeResponses = Callable[[list[int]], Iterable[Responses]]
"""Compute the responses to the requests at the given indices, batch by batch, in any order."""


def request_key(*parts: Any) -> str:
    """Return the name of a request: a hash of everything that distinguishes it from others."""
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()


class ResponseCache:
    """Responses by key: those read from a journal, and those computed since."""

    def __init__(self, journal: Journal | None = None) -> None:
        from bench.evaluation.distributed import current_process_group

        self._journal = journal
        entries = journal.entries if journal else []
        own = [pair for batch in entries for pair in batch]
        # Every process has a journal of its own. They are merged, because all processes must see
        # the same requests as missing: they partition that list without communicating.
        self._known: dict[str, Any] = dict(current_process_group().together(own))

    def answers(
        self, keys: Sequence[str], score: ComputeResponses, progress: Progress
    ) -> list[Any]:
        """Return the response to every key; those that are not cached are computed, each once."""
        # Reversed, so that of equal requests the index of the first one stays. Each distinct
        # request is computed once, and `missing` keeps the caller's order, on which batching and
        # prefix sharing rely.
        places = {name: place for place, name in reversed(list(enumerate(keys)))}
        missing = sorted(place for name, place in places.items() if name not in self._known)
        progress.total(len(places))
        progress.step(len(places) - len(missing))
        for batch in score(missing):
            given = [(keys[place], answer) for place, answer in batch]
            # Written before the next batch is computed, so a kill costs at most one batch.
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
        batches: AdaptiveBatches,
        work: Callable[[Sequence[Item]], list[Any]],
        progress: Progress,
    ) -> list[Any]:
        """Return the responses to `items`, computed in their order in batches.

        In a distributed evaluation, processes partition the items by `sizes` and exchange responses
        at the end. In a single process, the responses of an interrupted run are a prefix of that
        order, so a resumed run forms the batches that the interrupted one would have formed, and
        its numbers are bit-identical.
        """
        from bench.evaluation.distributed import current_process_group

        def own(mine: list[int]) -> Iterator[list[tuple[int, Any]]]:
            places = iter(mine)
            for answers in batches.each([items[place] for place in mine], work):
                # zip stops at the end of a batch without consuming the next index, since `answers`
                # comes first.
                yield [(place, answer) for answer, place in zip(answers, places, strict=False)]

        def score(missing: list[int]) -> Iterable[Responses]:
            # What is cached is a whole number of batches. That guarantee ends where memory ran out
            # (a resumed run starts again at the configured batch size) and with several processes,
            # whose shares of the missing items depend on how many are missing.
            return current_process_group().spread(missing, [sizes[place] for place in missing], own)

        return self.answers(keys, score, progress)
