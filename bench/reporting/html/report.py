"""The HTML report: records, leaderboard, details, tables, page.

A paper's table as the report shows it next to the runs.

The protocols describe the part of a table that the page depends on. Numbers are in their column's
unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from bench.errors import UserError
from bench.records import Record, Store
from bench.records.atomic_files import write_bytes
from bench.reporting.html import page, samples
from bench.reporting.html.samples import SampleShare
from bench.reporting.leaderboard import Leaderboard, LeaderboardRow, build_leaderboard
from bench.reporting.tables.builder import tables_of

# Records per compressed chunk: the browser unpacks a chunk to show one run, so a chunk must be
# small to open fast and large to compress well.
RUNS_PER_CHUNK = 50


@dataclass(frozen=True)
class WrittenReport:
    """The written report: its file and contents."""

    path: Path
    runs: int
    runs_with_samples: int
    bytes: int

    def __str__(self) -> str:
        """Describe the file in one line."""
        runs = f"{self.runs} run{'' if self.runs == 1 else 's'}"
        return f"{runs}, {self.runs_with_samples} with samples, {self.bytes / 1e6:.1f} MB"


def write_report(
    results_dir: Path,
    out: Path | None = None,
    share: SampleShare | None = None,
    tables: Callable[[Sequence[Record]], Iterable[Table]] = tables_of,
) -> WrittenReport:
    """Write one HTML file over all records of a results folder, atomically.

    `out` defaults to `report.html` in the folder; `share` limits the embedded samples; `tables`
    builds the papers' tables from the records.

    Raises:
        UserError: the folder does not exist, or the file cannot be written.
    """
    if not results_dir.is_dir():
        raise UserError(f"results_dir={results_dir}: no such folder, so there are no records")
    store, share = Store(results_dir), share or SampleShare()
    records = store.all()
    runs = build_leaderboard(records)
    asked = list(samples.sample_chunks(runs, store, share))
    content = page.render_page(
        index=_report_index(
            runs, store, share, asked, [table_entry(table) for table in tables(records)]
        ),
        details=[[run_details(record) for record in few] for few in _record_chunks(runs)],
        samples=asked,
    ).encode("utf-8", "replace")
    path = out or results_dir / "report.html"
    try:
        write_bytes(path, content)
        # The atomic write goes through a temporary file that only its owner may read; a report is
        # there to be shared.
        path.chmod(0o644)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"out={path}: cannot be written ({reason})") from None
    shown = sum(len(chunk["runs"]) for chunk in asked)
    return WrittenReport(path, len(records), shown, len(content))


def _record_chunks(runs: Leaderboard) -> list[list[Record]]:
    """Return the records in the order of the leaderboard, in chunks."""
    records = [row.record for row in runs.rows]
    return [records[at : at + RUNS_PER_CHUNK] for at in range(0, len(records), RUNS_PER_CHUNK)]


def _report_index(
    runs: Leaderboard,
    store: Store,
    share: SampleShare,
    asked: Sequence[dict[str, Any]],
    tables: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Return the data the page needs at once; everything else is unpacked when it is opened."""
    # Samples are chunked by setting and details by position, so a run has two chunk numbers.
    place = {run: at for at, chunk in enumerate(asked) for run in chunk["runs"]}
    return {
        "generated": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": version("slimbench"),
        "results": str(store.root),
        "settings": [asdict(setting) for setting in runs.settings],
        "runs": [
            _run_entry(row, at // RUNS_PER_CHUNK, place.get(row.record.id))
            for at, row in enumerate(runs.rows)
        ],
        "tables": tables,
        "share": asdict(share),
        "unreadable": store.unreadable,
    }


def _run_entry(row: LeaderboardRow, chunk: int, samples_chunk: int | None) -> dict[str, Any]:
    """Return one run as the leaderboard and the plots read it."""
    record = row.record
    return {
        "id": record.id,
        "setting": row.setting,
        "label": record.label,
        "family": row.family,
        "effect": row.effect,
        "real": row.real,
        "started": record.started[:19],
        "sweep": record.sweep,
        "dense": row.dense,
        "values": row.values,
        "costs": row.costs,
        "kept": row.retention,
        "chunk": chunk,
        "samples": samples_chunk,
    }


MAX_LIST_LENGTH = 100
"""List entries shown of a method's report; `record.json` has all of them."""


def run_details(record: Record) -> dict[str, Any]:
    """Return a record as plain data for the page of its run."""
    content = record.model_dump(mode="json")
    for method in content["methods"]:
        method["report"] = shorten_lists(method["report"])
    return content


def shorten_lists(value: Any) -> Any:
    """Cut long lists and append how many entries were cut."""
    if isinstance(value, dict):
        return {key: shorten_lists(item) for key, item in value.items()}
    if isinstance(value, list):
        cut = [shorten_lists(item) for item in value[:MAX_LIST_LENGTH]]
        left = len(value) - len(cut)
        return [*cut, f"{left} more in record.json"] if left else cut
    return value


class ColumnHead(Protocol):
    """A column: its name and the unit of its numbers."""

    @property
    def name(self) -> str:
        """The measured quantity."""

    @property
    def unit(self) -> str:
        """The unit; `%` for percentages."""


class OurValue(Protocol):
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


class PublishedCell(Protocol):
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


class TableCell(Protocol):
    """Our number, the published one, and their difference or the reason why there is none."""

    @property
    def ours(self) -> OurValue | None:
        """Our number; None if the run is missing."""

    @property
    def theirs(self) -> PublishedCell | None:
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


class TableLine(Protocol):
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
    def cells(self) -> Sequence[TableCell]:
        """One cell per column."""


class Table(Protocol):
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
    def heads(self) -> Sequence[ColumnHead]:
        """The columns."""

    @property
    def lines(self) -> Sequence[TableLine]:
        """The rows, section by section."""

    @property
    def notes(self) -> Sequence[str]:
        """Sources and caveats, one sentence each."""


def table_entry(table: Table) -> dict[str, Any]:
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
                "cells": [_cell_entry(cell) for cell in line.cells],
            }
            for line in table.lines
        ],
        "notes": list(table.notes),
    }


def _cell_entry(cell: TableCell) -> dict[str, Any]:
    ours, theirs = cell.ours, cell.theirs
    return {
        "ours": None if ours is None else [ours.value, ours.stderr, *ours.runs[:1]],
        "theirs": None if theirs is None else [theirs.text, theirs.unit, theirs.trust, theirs.flag],
        "difference": cell.difference,
        "inside": cell.inside,
        "refusal": cell.refusal,
    }
