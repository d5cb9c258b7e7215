"""What a report needs to know of a paper's table to show it beside the runs.

A protocol, so that the page depends on the shape of a table and not on how tables are built.
Numbers are in their column's unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Head(Protocol):
    """A column: its name and the unit of its numbers."""

    @property
    def name(self) -> str:
        """What is measured."""

    @property
    def unit(self) -> str:
        """The unit, `%` for shares of a hundred."""


class Ours(Protocol):
    """Our number and the runs that it comes from."""

    @property
    def value(self) -> float:
        """The number."""

    @property
    def stderr(self) -> float | None:
        """Its standard error, where it has one."""

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
        """Who says so: the paper, its authors' code, others."""

    @property
    def flag(self) -> str:
        """Why the number is suspicious; empty when it is not."""


class Cell(Protocol):
    """Our number, theirs, and their difference, or the reason why there is none."""

    @property
    def ours(self) -> Ours | None:
        """Ours; None when the run is missing."""

    @property
    def theirs(self) -> Theirs | None:
        """Theirs; None when it was not published."""

    @property
    def difference(self) -> float | None:
        """Ours less theirs, for numbers of the same identity."""

    @property
    def inside(self) -> bool | None:
        """Whether theirs lies in our interval."""

    @property
    def refusal(self) -> str | None:
        """Why the two are not subtracted."""


class Line(Protocol):
    """One method under one setting of one block."""

    @property
    def block(self) -> str:
        """The part of the table, such as its model."""

    @property
    def setting(self) -> str:
        """Such as a ratio."""

    @property
    def name(self) -> str:
        """The method as the table calls it."""

    @property
    def cells(self) -> Sequence[Cell]:
        """One a column."""


class PaperTable(Protocol):
    """A paper's table, rebuilt."""

    @property
    def file(self) -> str:
        """A name that no other table has."""

    @property
    def title(self) -> str:
        """What it shows."""

    @property
    def stand_in(self) -> bool:
        """Whether small models stand in for the paper's."""

    @property
    def heads(self) -> Sequence[Head]:
        """The columns."""

    @property
    def lines(self) -> Sequence[Line]:
        """The rows, by block."""

    @property
    def notes(self) -> Sequence[str]:
        """Sources and caveats, a sentence each."""


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
