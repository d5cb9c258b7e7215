"""A paper's table as the report shows it next to the runs.

The protocols describe the part of a table that the page depends on. Numbers are in their column's
unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Head(Protocol):
    """A column: its name and the unit of its numbers."""

    @property
    def name(self) -> str:
        """The measured quantity."""

    @property
    def unit(self) -> str:
        """The unit; `%` for percentages."""


class Ours(Protocol):
    """Our number and the runs it comes from."""

    @property
    def value(self) -> float:
        """The number."""

    @property
    def stderr(self) -> float | None:
        """Its standard error, if it has one."""

    @property
    def runs(self) -> Sequence[str]:
        """The ids of the runs."""


class Theirs(Protocol):
    """A published number as printed."""

    @property
    def text(self) -> str:
        """The number as its source prints it."""

    @property
    def unit(self) -> str:
        """The unit of the source."""

    @property
    def trust(self) -> str:
        """The kind of source: the paper, its authors' code, third parties."""

    @property
    def flag(self) -> str:
        """Why the number is suspicious; empty if it is not."""


class Cell(Protocol):
    """Our number, the published one, and their difference or the reason why there is none."""

    @property
    def ours(self) -> Ours | None:
        """Our number; None if the run is missing."""

    @property
    def theirs(self) -> Theirs | None:
        """The published number; None if there is none."""

    @property
    def difference(self) -> float | None:
        """Ours minus theirs, for numbers of the same identity."""

    @property
    def inside(self) -> bool | None:
        """Whether the published number lies in our interval."""

    @property
    def refusal(self) -> str | None:
        """Why the two are not subtracted."""


class Line(Protocol):
    """One method in one variant and section."""

    @property
    def block(self) -> str:
        """The section of the table, usually a model."""

    @property
    def setting(self) -> str:
        """The variant, a ratio for instance; may be empty."""

    @property
    def name(self) -> str:
        """The method as the table calls it."""

    @property
    def cells(self) -> Sequence[Cell]:
        """One cell per column."""


class PaperTable(Protocol):
    """A paper's table, reproduced."""

    @property
    def file(self) -> str:
        """A name that no other table has."""

    @property
    def title(self) -> str:
        """The title."""

    @property
    def stand_in(self) -> bool:
        """Whether small models stand in for the paper's."""

    @property
    def heads(self) -> Sequence[Head]:
        """The columns."""

    @property
    def lines(self) -> Sequence[Line]:
        """The rows, section by section."""

    @property
    def notes(self) -> Sequence[str]:
        """Sources and caveats, one sentence each."""


def described(table: PaperTable) -> dict[str, Any]:
    """Return a table as the page reads it."""
    return {
        "name": table.file,
        "title": table.title,
        "stand_in": table.stand_in,
        "heads": [{"name": head.name, "unit": head.unit} for head in table.heads],
        "lines": [
            {
                "block": line.block,
                "label": f"{line.name} {line.setting}".strip(),
                "cells": [_cell(cell) for cell in line.cells],
            }
            for line in table.lines
        ],
        "notes": list(table.notes),
    }


def _cell(cell: Cell) -> dict[str, Any]:
    ours, theirs = cell.ours, cell.theirs
    return {
        "ours": None if ours is None else [ours.value, ours.stderr, *ours.runs[:1]],
        "theirs": None if theirs is None else [theirs.text, theirs.unit, theirs.trust, theirs.flag],
        "difference": cell.difference,
        "inside": cell.inside,
        "refusal": cell.refusal,
    }
