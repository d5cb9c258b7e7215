"""Results on stdout: tables of rows, JSON, lines, and counts with decimal prefixes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from bench.errors import EXIT_DONE
from bench.security import clean

# Functions that draw import rich, because `bench --help` and launchers import this module.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_WIDTH = 200
UNBOUNDED_WIDTH = 100_000


def console() -> Console:
    """Return a console for results, which prints text verbatim and without control codes.

    Styles are given by `style=` or `rich.text.Text`. In a pipe the console is so wide that no
    number is folded.
    """
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class ResultConsole(Console):
        # All text passes here in segments, from every table or rule.
        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=clean(segment.text))

        def on_broken_pipe(self) -> None:
            raise  # noqa: PLE0704  # Called while it is handled; rich would exit the program.

    # rich assumes 80 columns if stdout is not a terminal and would fold wide tables. COLUMNS, if
    # set, is the user's choice and takes precedence.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    # Without markup, because rich would treat `[arc_easy]` in a command as a style and drop it, and
    # `[/x]` in an error message would raise.
    return ResultConsole(width=width, highlight=False, markup=False, emoji=False)


def draw_rows(rows: Sequence[Mapping[str, object]], title: str | None = None) -> None:
    """Print dictionaries with the same keys as one table; numeric columns are right-aligned."""
    from rich import box
    from rich.table import Table

    if not rows:
        print_text("nothing to list")
        return
    if len(rows) > MANY_ROWS:
        _print_plain(rows)
        return
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    out = console()
    widths = {k: max(len(k), *(len(_on_one_line(row[k])) for row in rows)) for k in rows[0]}
    # Spaces and lines between cells, of each column and of the table.
    left = out.width - 2 - sum(3 + min(width, FOLDED_CELL) for width in widths.values())
    for key in rows[0]:
        # rich aligns whole columns, and a missing value (None) makes a column left-aligned.
        numeric = all(isinstance(row[key], int | float) for row in rows)
        # A folded id or state cannot be read or copied. `min_width` is not used, because rich then
        # draws tables that are too wide.
        more = max(0, widths[key] - FOLDED_CELL)
        whole = widths[key] <= WHOLE_CELL and more <= left
        left -= more if whole else 0
        table.add_column(
            key, justify="right" if numeric else "left", overflow="fold", no_wrap=whole
        )
    for row in rows:
        table.add_row(*(_cell_text(value) for value in row.values()))
    out.print(table)


WHOLE_CELL, FOLDED_CELL = 22, 8
"""Characters of cells that are folded last (such as names of sweeps), and of any folded cell."""
MANY_ROWS = 300
"""Longer tables are printed without rich, which takes most of a millisecond per row."""


def _print_plain(rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows in columns as wide as their longest cell, without folding."""
    names = list(rows[0])
    cells = [
        names,
        *([_on_one_line(row[name]) for name in names] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["─" * width for width in widths])
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )
    sys.stdout.write("\n".join(lines) + "\n")


def _on_one_line(value: object) -> str:
    return " ".join(clean(_cell_text(value)).split())


def terminal_table(headings: Iterable[str], title: str | None = None, labels: int = 1) -> Table:
    """Return an empty table: `labels` columns without a heading, then right-aligned numbers."""
    from rich import box
    from rich.table import Table

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
    from rich.measure import Measurement

    # rich limits a measurement to the console's width, so every table would seem to fit. Measured
    # without a limit, the width is the one that the table needs.
    unbounded = out.options.update(max_width=UNBOUNDED_WIDTH)
    for count in range(most, 1, -1):
        table = build(count)
        if Measurement.get(out, unbounded, table).maximum <= out.width:
            return table, count
    return build(1), 1


def print_rows(rows: Sequence[Mapping[str, object]], *, as_json: bool = False) -> int:
    """Print rows as a table, or as JSON; return the exit code of the command."""
    if as_json:
        print_json(rows)
    else:
        draw_rows(rows)
    return EXIT_DONE


def print_json(value: object) -> None:
    """Print a value as JSON; values without a JSON type, such as paths, are written as text."""
    sys.stdout.write(f"{json.dumps(value, indent=1, default=str)}\n")


def print_text(text: str) -> None:
    """Print a text without folding; on a terminal, control characters are removed."""
    sys.stdout.write(f"{clean(text)}\n")


def format_quantity(value: float | None) -> str:
    """Format a count with a decimal prefix: 2.14 M."""
    if value is None:
        return "-"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.2f} {prefix}"
    return f"{value:g}"


def _cell_text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
