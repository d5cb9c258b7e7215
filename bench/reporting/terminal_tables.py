"""Tables for a terminal: a common style, and as many columns at a time as fit its width."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

UNBOUNDED_WIDTH = 100_000


def terminal_table(headings: Iterable[str], title: str | None = None, labels: int = 1) -> Table:
    """Return an empty table: `labels` columns without a heading, then right-aligned numbers."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", show_edge=False)
    # "fold" everywhere, because rich would otherwise truncate wide cells, and a truncated number is
    # a wrong number.
    for _ in range(labels):
        table.add_column("", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def widest_fitting(build: Callable[[int], Table], most: int, out: Console) -> tuple[Table, int]:
    """Return the widest table that fits the console, and its number of columns, at least one.

    `build` makes the table with a given number of columns.
    """
    # rich limits a measurement to the console's width, so every table would seem to fit. Measured
    # without a limit, the width is the one that the table needs.
    unbounded = out.options.update(max_width=UNBOUNDED_WIDTH)
    for count in range(most, 1, -1):
        table = build(count)
        if Measurement.get(out, unbounded, table).maximum <= out.width:
            return table, count
    return build(1), 1
