"""Response cache with which an interrupted evaluation resumes; all harness adapters use it.

An adapter identifies its requests by keys and supplies a function that computes missing responses,
which are stored batch by batch. A cache belongs to one run and one state of the weights (the
identity of its journal), so a key only needs to distinguish the requests of that run.
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
"""A response as JSON values (a list, not a tuple), because a resumed run reads it from a file."""
IndexedResponses: TypeAlias = list[tuple[int, Response]]
"""Responses of one batch with the indices of their requests."""


def request_key(*parts: object) -> str:
    """Return the key of a request: a hash of everything that distinguishes it from others."""
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()


def _is_response(pair: object) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)


class ResponseCache:
    """Responses by key: those read from a journal, and those computed by this process."""

    def __init__(self, journal: Journal | None = None) -> None:
        from bench.evaluation.distributed import current_process_group

        self._journal = journal
        entries = journal.entries if journal else []
        # The entries are checked, because the folder may come from an untrusted source.
        batches = (batch for batch in entries if isinstance(batch, list))
        own = [pair for batch in batches for pair in batch if _is_response(pair)]
        # Every process has its own journal. They are merged, because processes partition the list
        # of missing requests without communicating, so it must be the same for all.
        self._known: dict[str, object] = dict(current_process_group().all_gather(own))

    def get_or_compute(
        self,
        keys: Sequence[str],
        compute: Callable[[list[int]], Iterable[IndexedResponses[Response]]],
        progress: Progress,
    ) -> list[Response]:
        """Return the response to every key; responses that are not cached are computed once.

        `compute` gets the indices of the missing requests and yields their responses batch by
        batch, in any order.
        """
        # Reversed, so that of equal requests the first index is kept. `missing` has the caller's
        # order, on which batching and prefix sharing rely.
        index_of = {key: index for index, key in reversed(list(enumerate(keys)))}
        missing = sorted(index for key, index in index_of.items() if key not in self._known)
        progress.total(len(index_of))
        progress.resume(len(index_of) - len(missing))
        for batch in compute(missing):
            answered = [(keys[index], response) for index, response in batch]
            # Written before the next batch is computed, so that a kill loses at most one batch.
            if self._journal is not None and answered:
                self._journal.append(answered)
            self._known.update(answered)
            progress.step(len(answered))
        # The journal has results of `compute` from an earlier attempt, so the type is the same.
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
        """Return the responses to `items`, computed in batches in their order.

        `sizes` are the tokens of each item, by which the processes of a distributed evaluation
        partition the items. In a single process, a resumed run forms the same batches as an
        uninterrupted one, because the cached responses are a prefix of the items. Its numbers are
        therefore bit-identical.
        """
        from bench.evaluation.distributed import current_process_group

        def compute_shard(shard: list[int]) -> Iterator[IndexedResponses[Response]]:
            indices = iter(shard)
            lengths = [sizes[index] for index in shard]
            for responses in batches.map([items[index] for index in shard], work, lengths):
                # `responses` must be first, so that zip does not consume an index of the next
                # batch.
                yield [(i, response) for response, i in zip(responses, indices, strict=False)]

        def compute(missing: list[int]) -> Iterable[IndexedResponses[Response]]:
            # Whole batches are cached. Batches can differ if memory ran out (a resumed run starts
            # with the configured size), and with several processes, whose shares depend on the
            # number of missing items.
            work_of = [sizes[index] for index in missing]
            return current_process_group().scatter_work(missing, work_of, compute_shard)

        return self.get_or_compute(keys, compute, progress)
