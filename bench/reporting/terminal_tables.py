"""Tables of a terminal: one look, and as many columns at a time as fit its width."""

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
    # "fold" everywhere: rich would otherwise cut a cell that is too wide, and a cut number is a
    # wrong number.
    for _ in range(labels):
        table.add_column("", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def widest_fitting(build: Callable[[int], Table], most: int, out: Console) -> tuple[Table, int]:
    """Return the table of the most columns that fit the console, at least one, and their number.

    `build` makes the table of a given number of columns.
    """
    # rich clamps a measurement to the console's width, so that every table would seem to fit;
    # measured without a bound, the width is the one the table really needs.
    unbounded = out.options.update(max_width=UNBOUNDED_WIDTH)
    for count in range(most, 1, -1):
        table = build(count)
        if Measurement.get(out, unbounded, table).maximum <= out.width:
            return table, count
    return build(1), 1
