"""What a report needs to know of a paper's table to show it beside the runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Cell(Protocol):
    """One number of ours beside the published one; what is missing is None."""

    @property
    def ours(self) -> float | None:
        """Our value, in the table's unit."""

    @property
    def published(self) -> float | None:
        """The paper's value, in the table's unit."""

    @property
    def difference(self) -> float | None:
        """Ours minus theirs; None when the two numbers have different identities."""

    @property
    def within(self) -> bool | None:
        """Whether the difference lies within our interval."""

    @property
    def run(self) -> str | None:
        """The run that our value comes from."""

    @property
    def note(self) -> str | None:
        """Why there is no difference, in a few words."""


class PaperTable(Protocol):
    """A paper's table, rebuilt: rows of cells under columns."""

    @property
    def name(self) -> str:
        """The table's name on the command line."""

    @property
    def title(self) -> str:
        """What it shows; a stand-in model's table says so here."""

    @property
    def columns(self) -> Sequence[str]:
        """The columns' heads, without that of the row names."""

    @property
    def rows(self) -> Sequence[tuple[str, Sequence[Cell]]]:
        """Each row's name and its cells, one a column."""

    @property
    def notes(self) -> Sequence[str]:
        """Sources and caveats, one sentence each."""


def described(table: PaperTable) -> dict[str, Any]:
    """Return a table as the page reads it."""
    return {
        "name": table.name,
        "title": table.title,
        "columns": list(table.columns),
        "rows": [{"name": name, "cells": [_cell(c) for c in cells]} for name, cells in table.rows],
        "notes": list(table.notes),
    }


def _cell(cell: Cell) -> dict[str, Any]:
    names = ("ours", "published", "difference", "within", "run", "note")
    return {name: getattr(cell, name) for name in names}
