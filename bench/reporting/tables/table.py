"""A finished table, from which all formats (terminal, CSV, Markdown, LaTeX, HTML) are written.

Values are in their column's unit.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.reporting.tables.published import PublishedCell


@dataclass(frozen=True)
class ColumnHead:
    """A column: its name, the unit of its numbers, and whether lower is better.

    `label` states what our numbers were scored on if it differs from the name. The numbers of a
    column with `to_dense` are changes from the dense line of their section.
    """

    name: str
    unit: str
    lower_is_better: bool
    label: str | None = None
    to_dense: bool = False

    @property
    def text(self) -> str:
        """The label if there is one, else the name."""
        return self.label or self.name


@dataclass(frozen=True)
class OurValue:
    """Our number: one run's, or the mean over seeds, with its 95 % interval if it has one.

    `missing` is the number of samples without an answer, which are not included.
    """

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    runs: tuple[str, ...]
    missing: int = 0


@dataclass(frozen=True)
class TableCell:
    """Our number, the published one, and their difference or the reason why there is none.

    `inside` is true if the published number is in our interval. `published` has its source's own
    unit.
    """

    ours: OurValue | None = None
    published: PublishedCell | None = None
    difference: float | None = None
    inside: bool | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class TableLine:
    """One method with one variant in a section; `runs` are the ids of its records.

    `marks` are the warnings of its runs, such as `untrained`.
    """

    section: str
    variant: str
    name: str
    runs: tuple[str, ...]
    cells: tuple[TableCell, ...]
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class OrderAgreement:
    """Agreement with the source's order of methods: pairs in the same and in reversed order.

    `close` pairs are too close to call: zero is in the 95 % interval of our difference. `tau` is
    Kendall's tau-b over all methods, None for fewer than three.
    """

    section: str
    model: str
    variant: str
    column: str
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    same: int
    reversed: int
    close: int
    tau: float | None


@dataclass(frozen=True)
class Table:
    """A table of lines by columns, with notes and the agreement on the order of methods."""

    name: str
    title: str
    stand_in: bool
    columns: tuple[ColumnHead, ...]
    lines: tuple[TableLine, ...]
    notes: tuple[str, ...]
    agreements: tuple[OrderAgreement, ...]

    @property
    def file(self) -> str:
        """Name of the table's files without suffix; a stand-in never replaces the real table."""
        return f"{self.name}_micro" if self.stand_in else self.name

    @property
    def refusals(self) -> tuple[str, ...]:
        """Distinct reasons why numbers were not subtracted, in order of appearance."""
        reasons = (cell.refusal for line in self.lines for cell in line.cells)
        return tuple(dict.fromkeys(reason for reason in reasons if reason))
