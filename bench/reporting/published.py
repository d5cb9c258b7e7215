"""The papers' numbers as data: one row a cell, each with its source and how far to trust it.

The files are `results/published/*.csv`. An empty field means that the source does not say; a cell
that nobody has is not there at all. Values keep the digits that were printed.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib.resources
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from bench.errors import UserError, unknown

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

PACKAGE, SOURCES, SUMS = "results.published", "sources.csv", "SHA256SUMS"
Trust = Literal["paper", "authors_code", "secondary", "third_party"]
TRUST: dict[Trust, int] = {"paper": 0, "authors_code": 1, "secondary": 2, "third_party": 3}
"""From the most to the least trusted: the paper or its own picture, the authors' repository, a
note about the paper, somebody else's run or reprint."""


class Published(BaseModel):
    """One published cell.

    `model`, `row`, `setting` and `column` say where it stands; `metric`, `filter`, `shots`, `split`
    and `harness` what it measures, as far as the source says. `relation` is `<` or `>` where the
    source gives a bound. `flag` says what is suspicious about it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    paper: str
    table: str
    model: str
    row: str
    setting: str
    column: str
    metric: str
    filter: str
    shots: int | None
    split: str
    harness: str
    unit: str
    relation: Literal["=", "<", ">"]
    value: Decimal
    source: str
    trust: Trust
    flag: str

    @property
    def place(self) -> tuple[str, str, str, str]:
        """Where in its table the cell stands."""
        return (self.model, self.row, self.setting, self.column)

    @property
    def text(self) -> str:
        """The number as it was printed, with a bound's sign."""
        return f"{'' if self.relation == '=' else self.relation + ' '}{self.value}"


def names() -> list[str]:
    """Return the names of the files, which `read` takes."""
    files = (file.name for file in _folder().iterdir())
    return sorted(
        name.removesuffix(".csv") for name in files if name.endswith(".csv") and name != SOURCES
    )


@functools.cache
def read(name: str) -> tuple[Published, ...]:
    """Return all cells of one file.

    Raises:
        UserError: there is no such file, or it is not as it was shipped.
    """
    if name not in names():
        raise unknown("published file", name, names())
    content = _content(f"{name}.csv")
    return tuple(
        Published.model_validate({**row, "shots": row["shots"] or None})
        for row in csv.DictReader(content.splitlines())
    )


def cells(name: str, tables: Sequence[str]) -> dict[tuple[str, str, str, str], Published]:
    """Return the cells of some tables of a file by their place.

    Where several sources give a cell, the most trusted one stands; among equals the first table
    named, then the first in the file.
    """
    rows = [cell for cell in read(name) if cell.table in tables]
    rows.sort(key=lambda cell: (TRUST[cell.trust], tables.index(cell.table)))
    found: dict[tuple[str, str, str, str], Published] = {}
    for cell in rows:
        found.setdefault(cell.place, cell)
    return found


def sources() -> dict[str, str]:
    """Return what every source tag stands for."""
    rows = csv.DictReader(_content(SOURCES).splitlines())
    return {row["source"]: row["about"] for row in rows}


def checksums() -> Iterator[tuple[str, str, str]]:
    """Yield name, SHA-256 as shipped, and SHA-256 as found, of every file."""
    for line in (_folder() / SUMS).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        yield name, digest, hashlib.sha256((_folder() / name).read_bytes()).hexdigest()


def _content(file: str) -> str:
    """Return a file's text; a published number that was edited is no published number."""
    for name, shipped, found in checksums():
        if name == file and shipped != found:
            raise UserError(f"{PACKAGE}/{name} is not as it was shipped (SHA-256 {found[:12]})")
    return (_folder() / file).read_text(encoding="utf-8")


def _folder() -> Traversable:
    return importlib.resources.files(PACKAGE)
