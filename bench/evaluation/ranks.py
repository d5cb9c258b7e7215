"""Several processes that evaluate copies of one model together, one per device.

`accelerate launch -m bench.cli run ...` (or `torchrun`) starts them. Each asks the harness for all
requests and answers a share of them; answers are exchanged, so that every process has all, and the
first one writes. What is sent is Python objects, a few bytes an answer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, TypeVar

Value = TypeVar("Value")
Answers = list[tuple[int, Any]]
"""Answers with the places of what they answer."""

PATIENCE = timedelta(days=2)
"""How long a process waits for the slowest one."""

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
"""What the launchers say to a process about itself."""


@dataclass(frozen=True)
class Ranks:
    """This process, `number` of `count`."""

    number: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.number == 0

    def share(self, work: Sequence[int]) -> range:
        """Return the places of this process's items: neighbours, with an equal part of the work."""
        ends = [0, *accumulate(work)]
        owner = [
            min(self.count - 1, (begin + end) * self.count // (2 * ends[-1] or 1))
            for begin, end in pairwise(ends)
        ]
        mine = [place for place, rank in enumerate(owner) if rank == self.number]
        return range(mine[0], mine[-1] + 1) if mine else range(0)

    def spread(
        self,
        order: Sequence[int],
        work: Sequence[int],
        score: Callable[[list[int]], Iterable[Answers]],
    ) -> Iterator[Answers]:
        """Yield answers to all places, batch by batch: this process's, then all others' at once.

        Places are divided in this `order`, each worth its `work`; `score` answers a share of them.
        """
        mine = [order[number] for number in self.share(work)]
        own: Answers = []
        for answers in score(mine):
            own += answers
            yield answers
        known = set(mine)
        others = [each for each in self.together(own) if each[0] not in known]
        if others:
            yield others

    def together(self, found: list[Value]) -> list[Value]:
        """Return what all processes found, one process after the other."""
        if self.count == 1:
            return found
        from accelerate.utils import gather_object

        everything: list[Value] = gather_object(found)
        return everything

    def as_the_first(self, value: Value) -> Value:
        """Return the first process's value."""
        return self.together([value])[0]


@cache
def joined() -> Ranks:
    """Return this process's place among those it was launched with, and connect to them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    return Ranks(state.process_index, state.num_processes)


@contextmanager
def unseen() -> Iterator[None]:
    """Hide from a harness that there are others: it would divide the documents once more."""
    before = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
