"""Tables built from records, and whether the order of methods agrees with the source's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

from bench.records.record import AVERAGE
from bench.reporting.record_numbers import NORMAL_QUANTILE
from bench.reporting.tables import numbers, published
from bench.reporting.tables.matching import NamedRecords, by_choices, match_records
from bench.reporting.tables.table import (
    ColumnHead,
    OrderAgreement,
    OurValue,
    Table,
    TableCell,
    TableLine,
)
from bench.reporting.tables.table_config import (
    TableColumn,
    TableConfig,
    TableSlot,
    load_table_config,
    table_names,
    table_scales,
    table_slots,
)

if TYPE_CHECKING:
    from bench.records import Record
    from bench.reporting.tables.published import PublishedCell

PublishedCells = Mapping[tuple[str, str, str, str], "PublishedCell"]
"""Published cells of a section by model, row, variant (the file's `setting`) and column."""


class RatedMethod(NamedTuple):
    """One method with our number and the published one."""

    name: str
    ours: OurValue
    theirs: float


class PairCounts(NamedTuple):
    """Counts of pairs of methods: same order, reversed order, too close to call."""

    same: int
    reversed: int
    close: int


def table_of(name: str, records: Sequence[Record], scale: str | None = None) -> Table:
    """Return a table filled from records; the newest record of each run is used."""
    return _filled_table(name, scale, by_choices(records))


def _filled_table(name: str, scale: str | None, named: NamedRecords) -> Table:
    config = load_table_config(name, scale)
    return build_table(config, match_records(table_slots(config), named))


def tables_of(records: Sequence[Record]) -> Iterator[Table]:
    """Yield every table, real or stand-in, with a record for at least one line."""
    named = by_choices(records)
    for name in table_names():
        for scale in table_scales(name):
            table = _filled_table(name, scale, named)
            if any(line.runs for line in table.lines):
                yield table


def build_table(config: TableConfig, slot_records: Mapping[TableSlot, Sequence[Record]]) -> Table:
    """Combine the records of each line with the published cells."""
    theirs = {name: _section_cells(config, name) for name in config.sections}
    lines = {
        slot: _table_line(config, slot, slot_records.get(slot, ()), theirs[slot.section])
        for slot in table_slots(config)
    }
    labels = {name: _label(config, name, slot_records) for name in config.columns}
    changes = _changes(config, slot_records)
    return Table(
        name=config.name,
        title=config.title,
        stand_in=config.stand_in,
        columns=tuple(_heads(config, labels)),
        # Lines without our number and without a published one are left out. Others stay, because a
        # gap in the reproduction must be visible.
        lines=tuple(
            replace(line, cells=tuple(_beside(config, line.cells, changes.get(slot, {}))))
            for slot, line in lines.items()
            if line.runs or any(cell.published for cell in line.cells)
        ),
        notes=tuple(_notes(config, theirs)),
        agreements=tuple(_agreements(config, list(lines.values()), theirs, labels)),
    )


def _heads(config: TableConfig, labels: Mapping[str, str | None]) -> Iterator[ColumnHead]:
    """Yield the head of each column, and of its change from dense if the table has changes."""
    for name, column in config.columns.items():
        head = ColumnHead(name, column.unit, column.lower_is_better, labels[name])
        yield head
        if name in config.to_dense:
            label = head.label and f"{head.label} to dense"
            unit = column.unit if column.quantity is None else "%"
            yield ColumnHead(f"{name} to dense", unit, column.lower_is_better, label, to_dense=True)


def _beside(
    config: TableConfig, cells: Sequence[TableCell], changes: Mapping[str, TableCell]
) -> Iterator[TableCell]:
    """Yield a line's cells in the order of `_heads`."""
    for name, cell in zip(config.columns, cells, strict=True):
        yield cell
        if name in config.to_dense:
            yield changes.get(name, TableCell())


def _changes(
    config: TableConfig, slot_records: Mapping[TableSlot, Sequence[Record]]
) -> dict[TableSlot, dict[str, TableCell]]:
    """Return each line's changes from the dense line of its section, by column."""
    whole = {
        slot: records for slot, records in slot_records.items() if len(records) == len(slot.runs)
    }
    dense = {
        slot.section: records
        for slot, records in whole.items()
        if records and all(record.is_dense for record in records)
    }
    return {
        slot: {
            name: _change_cell(config, slot, name, records, dense[slot.section])
            for name in config.to_dense
        }
        for slot, records in whole.items()
        if slot.section in dense and not all(record.is_dense for record in records)
    }


def _change_cell(
    config: TableConfig,
    slot: TableSlot,
    name: str,
    records: Sequence[Record],
    dense: Sequence[Record],
) -> TableCell:
    column = numbers.with_variables(config.columns[name], config.sections[slot.section].variables)
    reason = numbers.unlike_dense(column, records, dense)
    if reason is not None:
        return TableCell(refusal=f"{name} to dense: {reason}")
    return TableCell(numbers.change_to_dense(column, records, dense))


def _section_cells(config: TableConfig, section: str) -> PublishedCells:
    if config.published is None:
        return {}
    tables = config.sections[section].tables or config.published.tables
    return published.published_cells(config.published.file, tables)


def _table_line(
    config: TableConfig, slot: TableSlot, records: Sequence[Record], theirs: PublishedCells
) -> TableLine:
    # All seeds or none, because a mean over some of them would change when the others arrive.
    whole = records if len(records) == len(slot.runs) else ()
    cells = [_table_cell(config, slot, name, whole, theirs) for name in config.columns]
    ids = tuple(record.id for record in whole)
    marks = tuple(dict.fromkeys(mark for record in whole for mark in record.marks))
    return TableLine(slot.section, slot.variant, slot.row, ids, tuple(cells), marks)


def _label(
    config: TableConfig, name: str, slot_records: Mapping[TableSlot, Sequence[Record]]
) -> str | None:
    """Return what a column's numbers were scored on; None if the column's name states it."""
    # Columns are named after real data sets, which a stand-in or a local file may replace.
    labels = dict.fromkeys(
        label
        for slot, records in slot_records.items()
        for label in numbers.scored_on(
            numbers.with_variables(config.columns[name], config.sections[slot.section].variables),
            records,
        )
    )
    task = config.columns[name].task
    if any(labels):
        # If the sections name the data sets, the column's name is that of a measured quantity.
        measured = f"{name}, " if task is not None and task.startswith("$") else ""
        return measured + " / ".join(label or name for label in labels)
    return f"embedded {task}" if config.stand_in and task not in (None, AVERAGE) else None


def _table_cell(
    config: TableConfig,
    slot: TableSlot,
    name: str,
    records: Sequence[Record],
    theirs: PublishedCells,
) -> TableCell:
    """Return one cell; in a stand-in table it has only our number."""
    column = numbers.with_variables(config.columns[name], config.sections[slot.section].variables)
    ours = numbers.our_value(column, records) if records else None
    if config.stand_in:
        return TableCell(ours)
    cell = _published_in_section(config, slot.section, slot.row, slot.variant, name, theirs)
    if ours is None or cell is None:
        return TableCell(ours, cell)
    # The reason with the widest scope is used: first that of a section in the table's config, then
    # of a row, then of a column, and last a difference of identities.
    known = config.sections[slot.section], config.rows[slot.row], column
    reason = next((part.differs for part in known if part.differs), None)
    reason = reason or numbers.incomparable_reason(column, records, cell)
    reason = reason or numbers.different_images(config.images, records)
    if reason is None and cell.relation != "=":
        reason = f"the published number is a bound: {cell.text}"
    if reason is not None:
        return TableCell(ours, cell, refusal=f"{name}: {reason}")
    value = numbers.convert_unit(cell, column.unit)
    inside = None
    if ours.low is not None and ours.high is not None:
        inside = ours.low <= value <= ours.high
    return TableCell(ours, cell, difference=ours.value - value, inside=inside)


def _published_in_section(
    config: TableConfig, section: str, row: str, variant: str, column: str, theirs: PublishedCells
) -> PublishedCell | None:
    """Return the published cell of a section's first model."""
    model = (config.sections[section].published or (section,))[0]
    return _published_of_model(config, model, row, variant, column, theirs)


def _published_of_model(
    config: TableConfig, model: str, row: str, variant: str, column: str, theirs: PublishedCells
) -> PublishedCell | None:
    name = config.rows[row].published or row
    return theirs.get((model, name, variant, config.columns[column].published or column))


def _notes(config: TableConfig, theirs: Mapping[str, PublishedCells]) -> Iterator[str]:
    """Yield what the source does not state, and what is suspicious in it."""
    if config.stand_in:
        return
    rows = {row.published or name for name, row in config.rows.items()}
    for name, column in config.columns.items():
        cells = [
            cell
            for section, published_of in theirs.items()
            for cell in published_of.values()
            if cell.model in (config.sections[section].published or (section,))
            and cell.row in rows
            and cell.column == (column.published or name)
        ]
        if cells and column.differs is None:
            open_parts = dict.fromkeys(
                part for c in cells for part in numbers.unstated_parts(column, c)
            )
            if open_parts:
                yield f"{name}: not stated by the source, assumed as ours: {', '.join(open_parts)}"
        for cell in cells:
            if cell.flag:
                where = " ".join(filter(None, (cell.model, cell.row, cell.setting, name)))
                yield f"{where}, {cell.text}: {cell.flag}"


def _agreements(
    config: TableConfig,
    lines: Sequence[TableLine],
    theirs: Mapping[str, PublishedCells],
    labels: Mapping[str, str | None],
) -> Iterator[OrderAgreement]:
    """Compare the order of methods with that of each published model, variant by variant."""
    variants = list(config.variants) or [""]
    for section, part in config.sections.items():
        # A section may represent several models of the source, each with its own order.
        for model in part.published or (section,):
            for variant in variants:
                same = [ln for ln in lines if (ln.section, ln.variant) == (section, variant)]
                for index, (name, column) in enumerate(config.columns.items()):
                    rated = list(_rated_methods(config, model, same, index, name, theirs[section]))
                    if len(rated) >= 2:
                        label = labels[name]
                        text = f"{label} against {name}" if label else name
                        yield _agreement(section, model, variant, text, column, rated)


def _rated_methods(
    config: TableConfig,
    model: str,
    lines: Sequence[TableLine],
    index: int,
    name: str,
    theirs: PublishedCells,
) -> Iterator[RatedMethod]:
    """Yield the methods with both numbers."""
    for line in lines:
        ours = line.cells[index].ours
        cell = _published_of_model(config, model, line.name, line.variant, name, theirs)
        # A bound cannot be ranked, because the number itself is unknown.
        if ours is not None and cell is not None and cell.relation == "=":
            factor = numbers.UNITS[cell.unit][1]
            yield RatedMethod(line.name, ours, float(cell.value) * factor)


def _agreement(
    section: str, model: str, variant: str, name: str, column: TableColumn, rated: list[RatedMethod]
) -> OrderAgreement:
    methods, lower = [r.name for r in rated], column.lower_is_better
    counted = count_pairs(rated)
    return OrderAgreement(
        section=section,
        model=model,
        variant=variant,
        column=name,
        ours=best_first(methods, [r.ours.value for r in rated], lower=lower),
        theirs=best_first(methods, [r.theirs for r in rated], lower=lower),
        same=counted.same,
        reversed=counted.reversed,
        close=counted.close,
        tau=kendall_tau(rated),
    )


def count_pairs(rated: Sequence[RatedMethod]) -> PairCounts:
    """Compare all pairs of methods; a tie on either side counts as close."""
    same = reverse = close = 0
    for one, two in combinations(rated, 2):
        here, there = one.ours.value - two.ours.value, one.theirs - two.theirs
        error = math.hypot(one.ours.stderr or 0.0, two.ours.stderr or 0.0)
        # The errors of the two methods are treated as independent. Because both are scored on the
        # same samples, the true error is usually smaller, and some "close" pairs are not.
        if abs(here) <= NORMAL_QUANTILE * error or here * there == 0:
            close += 1
        elif here * there > 0:
            same += 1
        else:
            reverse += 1
    return PairCounts(same, reverse, close)


def kendall_tau(rated: Sequence[RatedMethod]) -> float | None:
    """Return Kendall's tau-b between our values and theirs; None for fewer than three methods."""
    if len(rated) < 3:
        return None
    from scipy.stats import kendalltau

    value = float(kendalltau([r.ours.value for r in rated], [r.theirs for r in rated]).statistic)
    # Kendall's tau is undefined if all values of one side are equal.
    return None if math.isnan(value) else value


def best_first(names: Sequence[str], values: Sequence[float], *, lower: bool) -> tuple[str, ...]:
    """Return the names sorted by value, the best first."""
    ranked = sorted(zip(values, names, strict=True), key=lambda pair: pair[0], reverse=not lower)
    return tuple(name for _, name in ranked)
