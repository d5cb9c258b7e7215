"""Distributed evaluation: several processes, one per device, each with a copy of the model.

The processes are started by `accelerate launch --no_python bench run ...` or `torchrun`. Each of
them gets all requests from the harness and computes the responses to its share. Responses are then
exchanged as Python objects, a few bytes each, so that every process has all of them. The first
process writes the record.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import accumulate, pairwise
from typing import TypeVar

Value = TypeVar("Value")

# torch's default is 10 minutes (NCCL) or 30 (Gloo). Processes synchronise only at the end of a
# task, and if estimates of the work are wrong, their times may differ by hours.
COLLECTIVE_TIMEOUT = timedelta(days=2)
"""Timeout of collectives: how long a process waits for the slowest one."""
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Environment variables in which launchers pass a process its rank."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process: `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.rank == 0

    def shard(self, work: Sequence[int]) -> range:
        """Return the indices of this process's items: consecutive ones with equal work."""
        # Consecutive, because callers sort by length or prefix, so that neighbours need little
        # padding and share prefixes. An item belongs to the process in whose part of the work its
        # midpoint lies, which assigns every item once without communication. `or 1` is for items
        # without any work.
        ends = [0, *accumulate(work)]
        owner = [
            min(self.world_size - 1, (begin + end) * self.world_size // (2 * ends[-1] or 1))
            for begin, end in pairwise(ends)
        ]
        mine = [index for index, rank in enumerate(owner) if rank == self.rank]
        return range(mine[0], mine[-1] + 1) if mine else range(0)

    def scatter_work(
        self,
        order: Sequence[int],
        work: Sequence[int],
        compute: Callable[[list[int]], Iterable[list[tuple[int, Value]]]],
    ) -> Iterator[list[tuple[int, Value]]]:
        """Yield the responses to all indices, batch by batch.

        Those of this process come first, then those of all others at once. Indices are partitioned
        in the given `order`, weighted by their `work`; `compute` yields the responses to a part,
        with their indices.
        """
        mine = [order[index] for index in self.shard(work)]
        own: list[tuple[int, Value]] = []
        for batch in compute(mine):
            own += batch
            yield batch
        # The exchange is a barrier that every process must reach, even with an empty share. If one
        # raises an exception before it, the launcher kills the others, which would otherwise wait
        # for the timeout.
        known = set(mine)
        others = [response for response in self.all_gather(own) if response[0] not in known]
        if others:
            yield others

    def all_gather(self, items: list[Value]) -> list[Value]:
        """Return the items of all processes, concatenated by rank."""
        if self.world_size == 1:
            return items
        from accelerate.utils import gather_object

        gathered: list[Value] = gather_object(items)
        return gathered

    def broadcast(self, value: Value) -> Value:
        """Return the first process's value on every process."""
        return self.all_gather([value])[0]


@cache
def current_process_group() -> ProcessGroup:
    """Return the process group; the first call connects to the other processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ProcessGroup()
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=COLLECTIVE_TIMEOUT)
    return ProcessGroup(state.process_index, state.num_processes)


def leave_process_group() -> None:
    """Disconnect from the other processes; `current_process_group` connects again."""
    connected = current_process_group.cache_info().currsize > 0
    if connected and current_process_group().world_size > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
        # accelerate keeps its state in the class; without a reset it would not connect again.
        PartialState._reset_state()
    current_process_group.cache_clear()


@contextmanager
def hidden_from_harness() -> Iterator[None]:
    """Hide the distributed environment from a harness, which would partition documents again."""
    before = {name: os.environ.pop(name) for name in LAUNCHER_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
