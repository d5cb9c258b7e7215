"""Texts of cells, headings and notes, which are the same in every format of a table.

A cell has three texts: ours, theirs (the published number), and the difference or a reference to
the reason for its absence.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.reporting.tables.published import Trust
from bench.reporting.tables.table import (
    ColumnHead,
    OrderAgreement,
    OurValue,
    Table,
    TableCell,
    TableLine,
)
from bench.ui import format_quantity

DIGITS = {
    "%": 2, "share": 3, "perplexity": 2, "points": 1, "T": 2, "ms": 2, "s": 3, "min": 3, "h": 4,
    "ratio": 2,
}  # fmt: skip
"""Decimals by unit; counts and FLOPs have a decimal prefix instead."""
TRUST_MARKS: dict[Trust, str] = {
    "paper": "",
    "authors_code": "ᶜ",
    "secondary": "ˢ",
    "third_party": "ᵗ",
}
SUSPICIOUS, EMPTY = "!", "-"
STAND_IN = (
    "STAND-IN on the embedded models, not the paper's models or data: only the order of methods is "
    "compared with the paper; nothing is subtracted"
)
LEGEND = (
    "theirs: without a mark from the paper, ᶜ from its authors' repository, ˢ from a note about "
    "the paper, ᵗ run or reprinted by others, ! suspicious. ± is one standard error. in or out: "
    "theirs is inside or outside our 95 % interval"
)
CELL_KINDS = ("ours", "theirs", "difference")


def heading_text(table: Table) -> str:
    """Return the title, which says if the table is a stand-in."""
    return f"{table.title}: {STAND_IN}" if table.stand_in else table.title


def column_text(head: ColumnHead) -> str:
    """Return what a column's numbers were scored on, and their unit."""
    # A unit that repeats the name, as in "Perplexity perplexity", is left out.
    implied = {"count", "ratio", head.name, head.name.rstrip("s")}
    return head.text if head.unit in implied else f"{head.text} {head.unit}"


def line_text(line: TableLine) -> str:
    """Return a method and its variant, with the warnings of its runs."""
    marks = f"({', '.join(line.marks)})" if line.marks else ""
    return " ".join(filter(None, (line.name, line.variant, marks)))


def our_text(number: OurValue | None, head: ColumnHead) -> str:
    """Return our number with its standard error; changes from the dense model have a sign."""
    if number is None:
        return EMPTY
    if head.unit in ("count", "FLOP"):
        return format_quantity(number.value)
    digits = DIGITS[head.unit]
    text = f"{number.value:{'+' if head.to_dense else ''}.{digits}f}"
    error = "" if number.stderr is None else f" ±{number.stderr:.{digits}f}"
    return f"{text}{error}{f' ({number.missing} missing)' if number.missing else ''}"


def their_text(cell: TableCell, unit: str) -> str:
    """Return the published number as printed, with its marks, and with its unit if different."""
    if cell.published is None:
        return EMPTY
    own = "" if cell.published.unit == unit else f" {cell.published.unit}"
    flag = SUSPICIOUS if cell.published.flag else ""
    return f"{cell.published.text}{own}{TRUST_MARKS[cell.published.trust]}{flag}"


def difference_text(cell: TableCell, unit: str, refusals: Sequence[str]) -> str:
    """Return ours minus theirs and whether theirs is in our interval, or the number of a note."""
    if cell.refusal is not None:
        return f"not subtracted [{refusals.index(cell.refusal) + 1}]"
    if cell.difference is None:
        return EMPTY
    text = f"{cell.difference:+.{DIGITS.get(unit, 2)}f}"
    return text if cell.inside is None else f"{text} {'in' if cell.inside else 'out'}"


def cell_texts(table: Table, cell: TableCell, head: ColumnHead) -> tuple[str, str, str]:
    """Return a cell's three texts in the order of `CELL_KINDS`."""
    refused = difference_text(cell, head.unit, table.refusals)
    return our_text(cell.ours, head), their_text(cell, head.unit), refused


def line_kinds(table: Table, line: TableLine) -> tuple[str, ...]:
    """Return the kinds of numbers that a line has, at least ours."""
    texts = [cell_texts(table, c, h) for c, h in zip(line.cells, table.columns, strict=True)]
    kinds = [kind for i, kind in enumerate(CELL_KINDS) if any(text[i] != EMPTY for text in texts)]
    # A line without any number still has a name and an empty cell.
    return tuple(kinds) or ("ours",)


def best_cells(table: Table) -> frozenset[tuple[int, int]]:
    """Return line and column of our best numbers, which printed tables set in bold.

    Methods are compared within a section and a variant, such as 40 %. Lines without a variant, such
    as the dense model, are not compared, and a single number is not the best of its kind.
    """
    groups: dict[tuple[str, str, int], dict[int, float]] = {}
    for place, line in enumerate(table.lines):
        for column, cell in enumerate(line.cells):
            if line.variant and cell.ours is not None:
                group = groups.setdefault((line.section, line.variant, column), {})
                group[place] = cell.ours.value
    found: set[tuple[int, int]] = set()
    for (_, _, column), values in groups.items():
        choose = min if table.columns[column].lower_is_better else max
        best = choose(values.values())
        if len(values) > 1:
            found |= {(place, column) for place, value in values.items() if value == best}
    return frozenset(found)


def agreement_text(agreement: OrderAgreement) -> str:
    """Return one sentence on the order of methods."""
    where = " ".join(filter(None, (agreement.section, agreement.variant, agreement.column)))
    whose = "" if agreement.model == agreement.section else f" of {agreement.model}"
    pairs = agreement.same + agreement.reversed + agreement.close
    text = f"{where}: {agreement.same} of {pairs} pairs of methods in the published order{whose}"
    text += f", {agreement.reversed} reversed, {agreement.close} too close to call"
    if agreement.tau is not None:
        text += f"; Kendall's tau {agreement.tau:+.2f}"
    return f"{text}. Ours {' > '.join(agreement.ours)}; theirs {' > '.join(agreement.theirs)}"


def footnotes(table: Table) -> list[str]:
    """Return everything below a table, in order."""
    cites = any(cell.published for line in table.lines for cell in line.cells)
    shown = [LEGEND] if cites and not table.stand_in else []
    # Numbered by position in `refusals`, to which the cells refer.
    shown += [f"[{i}] {reason}" for i, reason in enumerate(table.refusals, 1)]
    return [*shown, *table.notes]


def lines_by_section(table: Table) -> list[tuple[str, list[TableLine]]]:
    """Return the lines by section, in order."""
    names = dict.fromkeys(line.section for line in table.lines)
    return [(name, [line for line in table.lines if line.section == name]) for name in names]
