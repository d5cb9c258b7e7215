"""Working through items in batches that fit: one that does not is halved and tried again."""

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
        """Yield the answers to one batch after the other, in the order of the items."""
        begin = 0
        while begin < len(items):
            batch = items[begin : begin + self.size]
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
        """Return None when memory ran out; the failed attempt's tensors die with this frame."""
        try:
            return work(batch)
        except RuntimeError as error:
            if not is_exhausted(error):
                raise
            return None

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise UserError("benchmark.batch_size: not even one sample fits into memory")
        self.size = tried // 2
        release(self._device)
        self._progress.console.print(
            f"[yellow]out of memory with a batch of {tried}: going on with {self.size}[/yellow]"
        )
