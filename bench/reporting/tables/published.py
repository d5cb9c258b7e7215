"""Published numbers of papers: one row per cell, with its source and its trust level.

The files are `results/published/*.csv`. An empty field means that the source does not state it; a
cell that no source reports has no row. Values keep their printed digits.
"""

from __future__ import annotations

import csv
import functools
import hashlib
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal

from pydantic import BaseModel, ConfigDict

from bench.errors import UserError, unknown_name
from bench.security import PUBLISHED_DIR

SOURCES, SUMS = "sources.csv", "SHA256SUMS"
Trust = Literal["paper", "authors_code", "secondary", "third_party"]
TRUST: dict[Trust, int] = {"paper": 0, "authors_code": 1, "secondary": 2, "third_party": 3}
"""Trust levels in descending order: the paper or its own figure, the authors' repository, a note
about the paper, a third party's run or reprint."""


class PublishedCell(BaseModel):
    """One published cell.

    `model`, `row`, `setting` and `column` locate it in its table; `metric`, `filter`, `shots`,
    `split` and `harness` identify what it measures, if the source states them. `relation` is `<` or
    `>` if the source gives a bound. `flag` explains why the number is suspicious.
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
    # Decimal keeps trailing zeros, because 71.20 must not be reprinted as 71.2.
    value: Decimal
    source: str
    trust: Trust
    flag: str

    @property
    def position(self) -> tuple[str, str, str, str]:
        """The position of the cell in its table."""
        return (self.model, self.row, self.setting, self.column)

    @property
    def text(self) -> str:
        """The number as printed, with the sign of a bound."""
        return f"{'' if self.relation == '=' else self.relation + ' '}{self.value}"


def published_names() -> list[str]:
    """Return the names of the files that `read_published` accepts."""
    files = (file.name for file in PUBLISHED_DIR.iterdir())
    return sorted(
        name.removesuffix(".csv") for name in files if name.endswith(".csv") and name != SOURCES
    )


@functools.cache
def read_published(name: str) -> tuple[PublishedCell, ...]:
    """Return all cells of one file.

    Raises:
        UserError: there is no such file, or it was modified after release.
    """
    if name not in published_names():
        raise unknown_name("published file", name, published_names())
    content = _verified_text(f"{name}.csv")
    return tuple(
        PublishedCell.model_validate({**row, "shots": row["shots"] or None})
        for row in csv.DictReader(content.splitlines())
    )


def published_cells(
    name: str, tables: Sequence[str]
) -> dict[tuple[str, str, str, str], PublishedCell]:
    """Return the cells of some tables of a file by position.

    If several sources report a cell, the most trusted one is used; among equals the table named
    first, then the first row in the file.
    """
    rows = [cell for cell in read_published(name) if cell.table in tables]
    rows.sort(key=lambda cell: (TRUST[cell.trust], tables.index(cell.table)))
    found: dict[tuple[str, str, str, str], PublishedCell] = {}
    # The sort is stable and `setdefault` keeps the first cell per position, which gives the order
    # of precedence above.
    for cell in rows:
        found.setdefault(cell.position, cell)
    return found


def released_checksums() -> dict[str, str]:
    """Return the SHA-256 of every released file."""
    lines = (PUBLISHED_DIR / SUMS).read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _verified_text(file: str) -> str:
    """Return the text of a file after checking it against its released checksum.

    Raises:
        UserError: the file differs from the released one, or was never released.
    """
    content = (PUBLISHED_DIR / file).read_bytes()
    released, found = released_checksums().get(file), hashlib.sha256(content).hexdigest()
    # An edited or added number is not a published one, and comparisons with it would be wrong
    # without any indication.
    if released is None:
        raise UserError(
            f"{PUBLISHED_DIR / file} is not listed in {SUMS}: remove it, or add its SHA-256"
        )
    if released != found:
        raise UserError(f"{PUBLISHED_DIR / file} was modified (SHA-256 {found[:12]}): restore it")
    return content.decode("utf-8")
