"""Batches that adapt to memory: one that does not fit is halved and retried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from bench.device import release
from bench.device.memory import is_exhausted
from bench.errors import UserError
from bench.progress import Progress

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Batches:
    """A batch size that shrinks when memory runs out and stays small from then on."""

    def __init__(self, size: int, device: torch.device, progress: Progress) -> None:
        self.size = size
        self._device = device
        self._progress = progress

    def each(
        self, items: Sequence[Item], work: Callable[[Sequence[Item]], list[Answer]]
    ) -> Iterator[list[Answer]]:
        """Yield the results of one batch after the other, in the order of the items."""
        begin = 0
        while begin < len(items):
            batch = items[begin : begin + self.size]
            # A batch is retried from its first item, so results keep the order of the items
            # whatever the sizes. The size never grows back: memory that ran out once will run out
            # again.
            done = self._attempt(batch, work)
            if done is None:
                self._halve(len(batch))
                continue
            begin += len(batch)
            yield done

    @staticmethod
    def _attempt(
        batch: Sequence[Item], work: Callable[[Sequence[Item]], list[Answer]]
    ) -> list[Answer] | None:
        """Return None if memory ran out."""
        # A frame of its own, left before memory is released: as long as the exception is being
        # handled, its traceback references the failed attempt's tensors, and nothing can be freed.
        try:
            return work(batch)
        except RuntimeError as error:
            if not is_exhausted(error):
                raise
            return None

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise UserError("benchmark.batch_size: a single sample does not fit into memory")
        self.size = tried // 2
        release(self._device)
        self._progress.console.print(
            f"[yellow]out of memory with a batch of {tried}: continuing with {self.size}[/yellow]"
        )
