"""Build a table from records and published cells; nothing is run and no model is touched."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.reporting import published
from bench.reporting.tables import numbers, order
from bench.reporting.tables.config import MICRO, Column, TableConfig, load, names
from bench.reporting.tables.slots import Overrides, Slot, slots
from bench.reporting.tables.table import Agreement, Cell, Head, Line, Table

if TYPE_CHECKING:
    from bench.records import Record
    from bench.reporting.published import Published

Cells = Mapping[tuple[str, str, str, str], "Published"]
"""Published cells of a section by model, row, variant (the file's `setting`) and column."""


def table_of(name: str, records: Sequence[Record], scale: str | None = None) -> Table:
    """Return a table filled from records; among records of one run the newest counts."""
    config = load(name, scale)
    return build(config, _matched(slots(config), records))


def tables_of(records: Sequence[Record]) -> Iterator[Table]:
    """Yield every table, real or stand-in, of which at least one line has a record."""
    for name in names():
        for scale in (None, MICRO):
            table = table_of(name, records, scale)
            if any(line.runs for line in table.lines):
                yield table


def build(config: TableConfig, found: Mapping[Slot, Sequence[Record]]) -> Table:
    """Put the records of each line next to the published cells."""
    theirs = {name: _cells(config, name) for name in config.blocks}
    lines = [_line(config, slot, found.get(slot, ()), theirs[slot.block]) for slot in slots(config)]
    columns = config.columns.items()
    return Table(
        name=config.name,
        title=config.title,
        stand_in=config.stand_in,
        heads=tuple(Head(name, c.unit, c.lower_is_better) for name, c in columns),
        # A line with neither our number nor a published one is left out; one with either stays,
        # since a gap in the reproduction has to be visible.
        lines=tuple(line for line in lines if line.runs or any(c.theirs for c in line.cells)),
        notes=tuple(_notes(config, theirs)),
        agreements=tuple(_agreements(config, lines, theirs)),
    )


def _cells(config: TableConfig, block: str) -> Cells:
    tables = config.blocks[block].tables or config.published.tables
    return published.cells(config.published.file, tables)


def _line(config: TableConfig, slot: Slot, records: Sequence[Record], theirs: Cells) -> Line:
    # A mean over some of the seeds would change when the rest arrives: all or nothing.
    whole = records if len(records) == len(slot.runs) else ()
    cells = [_cell(config, slot, name, whole, theirs) for name in config.columns]
    ids = tuple(record.id for record in whole)
    return Line(slot.block, slot.setting, slot.row, ids, tuple(cells))


def _cell(
    config: TableConfig, slot: Slot, name: str, records: Sequence[Record], theirs: Cells
) -> Cell:
    """Fill one cell; a stand-in shows our number only."""
    column = numbers.named(config.columns[name], config.blocks[slot.block].variables)
    ours = numbers.ours(column, records) if records else None
    if config.stand_in:
        return Cell(ours)
    cell = _theirs(config, slot.block, slot.row, slot.setting, name, theirs)
    if ours is None or cell is None:
        return Cell(ours, cell)
    # The reason with the widest scope wins: what the table's author knows about a row, then about a
    # column, then what the identities say.
    reason = config.rows[slot.row].differs or column.differs
    reason = reason or numbers.clash(column, records, cell)
    if reason is None and cell.relation != "=":
        reason = f"the published number is a bound: {cell.text}"
    if reason is not None:
        return Cell(ours, cell, refusal=f"{name}: {reason}")
    value = numbers.converted(cell, column.unit)
    inside = None
    if ours.low is not None and ours.high is not None:
        inside = ours.low <= value <= ours.high
    return Cell(ours, cell, difference=ours.value - value, inside=inside)


def _theirs(
    config: TableConfig, block: str, row: str, setting: str, column: str, theirs: Cells
) -> Published | None:
    """Return the published cell of a section's first model."""
    model = (config.blocks[block].published or (block,))[0]
    return _published(config, model, row, setting, column, theirs)


def _published(
    config: TableConfig, model: str, row: str, setting: str, column: str, theirs: Cells
) -> Published | None:
    place = config.rows[row].published or row, config.columns[column].published or column
    return theirs.get((model, place[0], setting, place[1]))


def _notes(config: TableConfig, theirs: Mapping[str, Cells]) -> Iterator[str]:
    """Yield what the source leaves open and what is suspicious in it."""
    if config.stand_in:
        return
    rows = {row.published or name for name, row in config.rows.items()}
    for name, column in config.columns.items():
        cells = [
            cell
            for block, places in theirs.items()
            for cell in places.values()
            if cell.model in (config.blocks[block].published or (block,))
            and cell.row in rows
            and cell.column == (column.published or name)
        ]
        if cells and column.differs is None:
            open_parts = dict.fromkeys(part for c in cells for part in numbers.assumed(column, c))
            if open_parts:
                yield f"{name}: not stated by the source, assumed as ours: {', '.join(open_parts)}"
        for cell in cells:
            if cell.flag:
                where = " ".join(filter(None, (cell.model, cell.row, cell.setting, name)))
                yield f"{where}, {cell.text}: {cell.flag}"


def _agreements(
    config: TableConfig, lines: Sequence[Line], theirs: Mapping[str, Cells]
) -> Iterator[Agreement]:
    """Compare the order of methods with each published model, variant by variant."""
    settings = list(config.settings) or [""]
    for block, part in config.blocks.items():
        # A section may stand for several models of the source; each of them gives an order of its
        # own.
        for model in part.published or (block,):
            for setting in settings:
                same = [ln for ln in lines if (ln.block, ln.setting) == (block, setting)]
                for place, (name, column) in enumerate(config.columns.items()):
                    rated = list(_rated(config, model, same, place, name, theirs[block]))
                    if len(rated) >= 2:
                        yield _agreement(block, model, setting, name, column, rated)


def _rated(
    config: TableConfig, model: str, lines: Sequence[Line], place: int, name: str, theirs: Cells
) -> Iterator[order.Rated]:
    """Yield the methods for which both numbers are known."""
    for line in lines:
        ours = line.cells[place].ours
        cell = _published(config, model, line.name, line.setting, name, theirs)
        # A bound cannot be ranked: the number behind it is unknown.
        if ours is not None and cell is not None and cell.relation == "=":
            factor = numbers.FACTORS[cell.unit][1]
            yield order.Rated(line.name, ours, float(cell.value) * factor)


def _agreement(
    block: str, model: str, setting: str, name: str, column: Column, rated: list[order.Rated]
) -> Agreement:
    methods, lower = [r.name for r in rated], column.lower_is_better
    counted = order.pairs(rated)
    return Agreement(
        block=block,
        model=model,
        setting=setting,
        column=name,
        ours=order.best_first(methods, [r.ours.value for r in rated], lower),
        theirs=order.best_first(methods, [r.theirs for r in rated], lower),
        same=counted.same,
        other=counted.other,
        close=counted.close,
        tau=order.tau(rated),
    )


def _matched(lines: Sequence[Slot], records: Sequence[Record]) -> dict[Slot, list[Record]]:
    """Find the records of each line by everything that determines a result, except the device."""
    # Identities are exact but need a run to be composed by Hydra, which is slow. The choices of
    # config groups can be read from the overrides and rule out nearly all records first.
    named: dict[_Names, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.started, reverse=True):
        named.setdefault(_names_of(record), []).append(record)
    found: dict[Slot, list[Record]] = {}
    for slot in lines:
        hits = [_newest(run, named.get(_names_in(run), ())) for run in slot.runs]
        if hits and all(hits):
            found[slot] = [hit for hit in hits if hit is not None]
    return found


class _Names(NamedTuple):
    """A run's choices of config groups: cheap to compare before anything is composed."""

    model: str
    benchmark: str
    methods: tuple[str, ...]


def _names_of(record: Record) -> _Names:
    config = record.config
    return _Names(config["model"]["name"], config["benchmark"]["name"], tuple(config["method"]))


def _names_in(run: Overrides) -> _Names:
    chosen = dict(override.split("=", 1) for override in run)
    methods = chosen.get("method", "").strip("[]").split(",")
    # `method=dense` and no method at all are the same run.
    named = tuple(name for name in methods if name not in ("", "dense"))
    return _Names(chosen.get("model", ""), chosen.get("benchmark", ""), named)


def _newest(run: Overrides, likely: Sequence[Record]) -> Record | None:
    """Return the first of the records (newest first) whose identity equals the run's."""
    from bench.config import identity_of

    for record in likely:
        # The provenance shows whether the run read calibration text or prompts. Settings that no
        # method read have no influence and are left out of the identity.
        calibrated = record.provenance.get("calibration") is not None
        prompted = record.provenance.get("prompts") is not None
        found = identity_of(record.config, calibrated=calibrated, prompted=prompted)
        if found == _identity(run):
            return record
    return None


@functools.lru_cache(maxsize=1024)
def _identity(run: Overrides) -> dict[str, Any]:
    """Compose a run and return its identity; cached, because composing is slow."""
    from bench.compose import run_config

    return run_config(list(run)).identity()
