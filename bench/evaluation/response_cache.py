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
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

if TYPE_CHECKING:
    from bench.evaluation.batching import AdaptiveBatches
    from bench.records.journal import Journal
    from bench.ui import Progress

Item = TypeVar("Item")
Response = TypeVar("Response")
"""A response as JSON, for instance a list and not a tuple: a resumed run reads it from a file."""
IndexedResponses: TypeAlias = list[tuple[int, Response]]
"""Responses of one batch with the indices of their requests."""


def request_key(*parts: object) -> str:
    """Return the name of a request: a hash of everything that distinguishes it from others."""
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()


def _is_response(pair: object) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)


class ResponseCache:
    """Responses by key: those read from a journal, and those computed since."""

    def __init__(self, journal: Journal | None = None) -> None:
        from bench.evaluation.distributed import current_process_group

        self._journal = journal
        entries = journal.entries if journal else []
        # A journal of the right identity may still hold anything: the folder may be a stranger's.
        batches = (batch for batch in entries if isinstance(batch, list))
        own = [pair for batch in batches for pair in batch if _is_response(pair)]
        # Every process has a journal of its own. They are merged, because all processes must see
        # the same requests as missing: they partition that list without communicating.
        self._known: dict[str, object] = dict(current_process_group().all_gather(own))

    def get_or_compute(
        self,
        keys: Sequence[str],
        compute: Callable[[list[int]], Iterable[IndexedResponses[Response]]],
        progress: Progress,
    ) -> list[Response]:
        """Return the response to every key; those that are not cached are computed, each once.

        `compute` is given the indices of the missing requests and yields their responses batch by
        batch, in any order.
        """
        # Reversed, so that of equal requests the index of the first one stays. Each distinct
        # request is computed once, and `missing` keeps the caller's order, on which batching and
        # prefix sharing rely.
        index_of = {key: index for index, key in reversed(list(enumerate(keys)))}
        missing = sorted(index for key, index in index_of.items() if key not in self._known)
        progress.total(len(index_of))
        progress.step(len(index_of) - len(missing))
        for batch in compute(missing):
            answered = [(keys[index], response) for index, response in batch]
            # Written before the next batch is computed, so a kill costs at most one batch.
            if self._journal is not None and answered:
                self._journal.append(answered)
            self._known.update(answered)
            progress.step(len(answered))
        # The journal holds what `compute` gave in an earlier attempt, so the type is the same.
        return [cast("Response", self._known[key]) for key in keys]

    def get_or_compute_batched(
        self,
        keys: Sequence[str],
        items: Sequence[Item],
        sizes: Sequence[int],
        batches: AdaptiveBatches,
        work: Callable[[Sequence[Item]], list[Response]],
        progress: Progress,
    ) -> list[Response]:
        """Return the responses to `items`, computed in their order in batches.

        `sizes` are the tokens of each item. In a distributed evaluation, processes partition the
        items by them and exchange responses at the end. In a single process, the responses of an
        interrupted run are a prefix of that order, so a resumed run forms the batches that the
        interrupted one would have formed, and its numbers are bit-identical.
        """
        from bench.evaluation.distributed import current_process_group

        def compute_shard(shard: list[int]) -> Iterator[IndexedResponses[Response]]:
            indices = iter(shard)
            lengths = [sizes[index] for index in shard]
            for responses in batches.map([items[index] for index in shard], work, lengths):
                # zip stops at the end of a batch without consuming the next index, since
                # `responses` comes first.
                yield [(i, response) for response, i in zip(responses, indices, strict=False)]

        def compute(missing: list[int]) -> Iterable[IndexedResponses[Response]]:
            # What is cached is a whole number of batches. That guarantee ends where memory ran out
            # (a resumed run starts again at the configured batch size) and with several processes,
            # whose shares of the missing items depend on how many are missing.
            work_of = [sizes[index] for index in missing]
            return current_process_group().scatter_work(missing, work_of, compute_shard)

        return self.get_or_compute(keys, compute, progress)
