"""Working through items in batches that fit: one that does not is halved and tried again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from bench.device import release
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

    def run(
        self, items: Sequence[Item], work: Callable[[Sequence[Item]], list[Answer]]
    ) -> list[Answer]:
        """Return the answers to all items in their order, advancing the current phase."""
        answers: list[Answer] = []
        while len(answers) < len(items):
            batch = items[len(answers) : len(answers) + self.size]
            done = self._attempt(batch, work)
            if done is None:
                self._halve(len(batch))
                continue
            answers += done
            self._progress.step(len(batch))
        return answers

    @staticmethod
    def _attempt(
        batch: Sequence[Item], work: Callable[[Sequence[Item]], list[Answer]]
    ) -> list[Answer] | None:
        """Return None when memory ran out; the failed attempt's tensors die with this frame."""
        try:
            return work(batch)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
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


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
