"""How a long phase tells what it is doing, how far it is and how long it will take.

The display is rich's; it is quiet when the output is not a terminal. Everything that takes
long receives a `Progress` and calls `track` or `step`; nothing else prints.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

Item = TypeVar("Item")


class Progress:
    """Named phases, one bar each; wall seconds per phase are kept in `seconds`."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True)
        self.seconds: dict[str, float] = {}
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self._current: TaskID | None = None

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        """Show one phase while the block runs and remember its wall time under `name`."""
        outer, started = self._current, time.perf_counter()
        if outer is None:
            self._bars.start()
        self._current = self._bars.add_task(name, total=total)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
            self._bars.remove_task(self._current)
            self._current = outer
            if outer is None:
                self._bars.stop()

    def total(self, total: int) -> None:
        """Say how many steps the current phase has, once that is known."""
        if self._current is not None:
            self._bars.update(self._current, total=total, completed=0)

    def step(self, count: int = 1, doing: str | None = None) -> None:
        """Advance the current phase, optionally saying what it is doing now."""
        if self._current is not None:
            extra = {} if doing is None else {"description": doing}
            self._bars.update(self._current, advance=count, **extra)  # type: ignore[arg-type]

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line for the user as it is, brackets, long paths and all."""
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a line that the user should not miss."""
        self.say(text, "yellow")

    def track(self, items: Iterable[Item], doing: str, total: int | None = None) -> Iterator[Item]:
        """Yield `items` as one phase named `doing`, a step each."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        with self.phase(doing, total):
            for item in items:
                yield item
                self.step()


SILENT = Progress(quiet=True)
