"""Progress display: the current phase, its progress and its remaining time.

The display is rich's; it is off if the output is not a terminal. Everything that takes long
receives a `Progress` and calls `track` or `step`; nothing else prints.
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
    """Named phases, one bar each; `seconds` holds the wall time per phase."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        # stderr, so that the output of a command can be piped.
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
        """Show a phase while the block runs and add its wall time to `seconds[name]`."""
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
        """Set the number of steps of the current phase, once it is known."""
        if self._current is not None:
            self._bars.update(self._current, total=total, completed=0)

    def step(self, count: int = 1, doing: str | None = None) -> None:
        """Advance the current phase, optionally with a new description."""
        if self._current is not None:
            extra = {} if doing is None else {"description": doing}
            self._bars.update(self._current, advance=count, **extra)  # type: ignore[arg-type]

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line verbatim: no markup, no highlighting, no wrapping of long paths."""
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a line that the user should not miss."""
        self.say(text, "yellow")

    def track(self, items: Iterable[Item], doing: str, total: int | None = None) -> Iterator[Item]:
        """Yield `items` as one phase named `doing`, one step each."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        with self.phase(doing, total):
            for item in items:
                yield item
                self.step()


SILENT = Progress(quiet=True)
