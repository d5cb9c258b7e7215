"""What a terminal shows: phases and progress, tables of rows, counts with decimal prefixes.

Progress display: the current phase, its progress and its remaining time.

The display is rich's; it is off if the output is not a terminal. Everything that takes long
receives a `Progress` and calls `track` or `step`; nothing else prints.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from rich import box
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
from rich.table import Table

from bench.errors import EXIT_DONE

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
PIPE_WIDTH = 200


def console() -> Console:
    """Return a console for results, wide enough in a pipe that no number is folded."""
    # rich assumes 80 columns when stdout is not a terminal and would fold wide tables. COLUMNS,
    # where it is set, is the user's own choice and wins.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    # Markup is off: commands, labels and paths contain square brackets, which rich would take for
    # its own tags, drop, or refuse.
    return Console(width=width, highlight=False, markup=False)


def draw_rows(rows: Sequence[dict[str, Any]], title: str | None = None) -> None:
    """Print dictionaries with the same keys as one table; numeric columns are right-aligned."""
    if not rows:
        console().print("nothing to list")
        return
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for key in rows[0]:
        # rich aligns whole columns: one missing value (None) makes a column left-aligned.
        numeric = all(isinstance(row[key], int | float) for row in rows)
        table.add_column(key, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell_text(value) for value in row.values()))
    console().print(table)


def _cell_text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def format_quantity(value: float | None) -> str:
    """Format a count with a decimal prefix: 2.14 M."""
    if value is None:
        return "-"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.2f} {prefix}"
    return f"{value:g}"


def print_rows(rows: list[dict[str, Any]], as_json: bool) -> int:
    """Print rows as a table, or as JSON."""
    if as_json:
        print(json.dumps(rows, indent=1))
        return EXIT_DONE

    draw_rows(rows)
    return EXIT_DONE
