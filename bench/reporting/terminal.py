"""Tables and number formatting for the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PIPE_WIDTH = 200


def console() -> Console:
    """Return a console for results, wide enough in a pipe that no number is folded."""
    # rich assumes 80 columns when stdout is not a terminal and would fold wide tables. COLUMNS,
    # where it is set, is the user's own choice and wins.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(width=width, highlight=False)


def print_rows(rows: Sequence[dict[str, Any]], title: str | None = None) -> None:
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
        table.add_row(*(_text(value) for value in row.values()))
    console().print(table)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    # Commands and lists contain square brackets, which rich would parse as markup and drop.
    return escape(str(value))


def quantity(value: float | None) -> str:
    """Format a count with a decimal prefix: 2.14 M."""
    if value is None:
        return "-"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.2f} {prefix}"
    return f"{value:g}"
