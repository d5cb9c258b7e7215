"""The HTML report over all records of a results folder: collecting, packing and writing.

The page loads an index immediately (leaderboard, papers' tables), and unpacks chunks of records and
samples when a run is opened.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from bench.errors import UserError
from bench.records import Metric, Record, Store
from bench.records.files import refuse_unwritable, write_bytes
from bench.reporting.html import page, samples
from bench.reporting.html.samples import SampleChunk, SampleShare
from bench.reporting.leaderboard import Leaderboard, LeaderboardRow, build_leaderboard
from bench.reporting.record_numbers import PERCENT_METRICS, metric_identity
from bench.reporting.study import Study, best_so_far, studies_in
from bench.reporting.tables.builder import tables_of
from bench.reporting.tables.cell_text import DIGITS, TRUST_MARKS, line_text
from bench.reporting.tables.table import Table, TableCell
from bench.reporting.tables.writers import TABLE_FOLDER
from bench.reporting.terminal_views import describe_config

# Records per compressed chunk. The browser unpacks a chunk to show one run: small chunks open fast,
# large ones compress well.
RUNS_PER_CHUNK = 50


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Pause garbage collection, which would search records that are needed to the end."""
    # With thousands of records, this saves a fifth of the time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class WrittenReport:
    """The written report: its file and contents."""

    path: Path
    runs: int
    runs_with_samples: int
    bytes: int

    def __str__(self) -> str:
        """Return a line about the file."""
        runs = f"{self.runs} run{'' if self.runs == 1 else 's'}"
        return f"{runs}, {self.runs_with_samples} with samples, {self.bytes / 1e6:.1f} MB"


@_collection_paused()
def write_report(
    results_dir: Path,
    out: Path | None = None,
    share: SampleShare | None = None,
    tables: Callable[[Sequence[Record]], Iterable[Table]] | None = None,
) -> WrittenReport:
    """Write one HTML file over all records of a results folder, atomically.

    `out` defaults to `report.html` in the folder; `share` limits the embedded samples; `tables`
    builds the papers' tables from the records, by default those that `bench table` has written.

    Raises:
        UserError: the folder does not exist, or the file cannot be written.
    """
    if not results_dir.is_dir():
        raise UserError(f"results_dir={results_dir}: no such folder, so there are no records")
    path = out or results_dir / "report.html"
    refuse_unwritable("--out", path)
    store, share = Store(results_dir), share or SampleShare()
    records = store.all()
    leaderboard = build_leaderboard(records)
    built = tables(records) if tables is not None else _built_tables(records, results_dir)
    chunks = list(samples.sample_chunks(leaderboard, store, share))
    searches = studies_in(results_dir)
    content = page.render_page(
        index=_report_index(
            leaderboard, store, share, chunks, [table_entry(table) for table in built], searches
        ),
        details=[
            [run_details(record) for record in chunk] for chunk in _record_chunks(leaderboard)
        ],
        samples=chunks,
        searches=[search_entry(search) for search in searches],
    ).encode("utf-8", "replace")
    write_bytes(path, content)
    # The temporary file of the atomic write is readable only by its owner, but a report is for
    # sharing.
    path.chmod(0o644)
    shown = sum(bool(run["total"]) for chunk in chunks for run in chunk["runs"].values())
    return WrittenReport(path, len(records), shown, len(content))


def _built_tables(records: Sequence[Record], results_dir: Path) -> list[Table]:
    """Return the papers' tables that a user has built; records may match others by chance."""
    folder = results_dir / TABLE_FOLDER
    written = {file.stem for file in folder.glob("*.csv")} if folder.is_dir() else set()
    return [table for table in tables_of(records) if table.file in written] if written else []


def _record_chunks(leaderboard: Leaderboard) -> list[list[Record]]:
    """Return the records in the order of the leaderboard, in chunks."""
    records = [row.record for row in leaderboard.rows]
    return [records[at : at + RUNS_PER_CHUNK] for at in range(0, len(records), RUNS_PER_CHUNK)]


def _report_index(
    leaderboard: Leaderboard,
    store: Store,
    share: SampleShare,
    chunks: Sequence[SampleChunk],
    tables: Sequence[dict[str, object]],
    searches: Sequence[Study],
) -> dict[str, object]:
    """Return the data that the page needs immediately; the rest is unpacked on demand."""
    # Samples are chunked by setting and details by position, so a run has two chunk numbers.
    chunk_of_run = {run: at for at, chunk in enumerate(chunks) for run in chunk["runs"]}
    return {
        "generated": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": version("slimbench"),
        "results": str(store.root),
        "settings": [
            {**asdict(setting), "first_cost": setting.first_cost}
            for setting in leaderboard.settings
        ],
        "runs": [
            _run_entry(row, at // RUNS_PER_CHUNK, chunk_of_run.get(row.record.id))
            for at, row in enumerate(leaderboard.rows)
        ],
        "tables": tables,
        "searches": [
            {"name": search.report["study"], "sweeps": search.sweeps} for search in searches
        ],
        "about": _sentences(leaderboard),
        "share": asdict(share),
        "unreadable": store.unreadable,
    }


def _sentences(leaderboard: Leaderboard) -> dict[str, dict[str, str]]:
    """Return the description of each method, model and benchmark in the report, by config."""
    names = {
        "method": {method.name for row in leaderboard.rows for method in row.record.methods},
        "model": {setting.model for setting in leaderboard.settings},
        "benchmark": {setting.benchmark for setting in leaderboard.settings},
    }
    return {
        # Names in untrusted records may be anything, but are used to look up config files.
        group: {name: describe_config(group, name) for name in sorted(found) if name.isidentifier()}
        for group, found in names.items()
    }


def _run_entry(row: LeaderboardRow, chunk: int, samples_chunk: int | None) -> dict[str, object]:
    """Return one run as the leaderboard and the plots read it."""
    record = row.record
    return {
        "id": record.id,
        "setting": row.setting,
        "label": row.label,
        "family": row.family,
        "effect": row.effect,
        "real": row.real,
        "started": record.started[:19],
        "sweep": record.sweep,
        "dense": row.dense,
        "values": row.values,
        "answered": row.answered,
        "costs": row.costs,
        "retention": row.retention,
        "chunk": chunk,
        "samples": samples_chunk,
    }


MAX_LIST_LENGTH = 100
"""Maximum number of list entries shown of a method's report; `record.json` has all of them."""


def run_details(record: Record) -> dict[str, object]:
    """Return a record as plain data for the page of its run.

    A metric also has its `identity` (equal ones are comparable), and `percent` if it is a fraction.
    """
    content = record.model_dump(mode="json")
    for metric, entry in zip(record.metrics, content["metrics"], strict=True):
        entry["identity"] = _identity_digest(record, metric)
        entry["percent"] = metric.metric in PERCENT_METRICS
    for method in content["methods"]:
        method["report"] = shorten_lists(method["report"])
    return content


def _identity_digest(record: Record, metric: Metric) -> str:
    # A digest, because the page only tests for equality and fingerprints of data are long. JSON
    # would take ten times as long for the many metrics of a large report.
    text = repr([*metric_identity(record, metric).values()])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def shorten_lists(value: object) -> object:
    """Truncate long lists and append the number of omitted entries."""
    if isinstance(value, dict):
        return {key: shorten_lists(item) for key, item in value.items()}
    if isinstance(value, list):
        cut = [shorten_lists(item) for item in value[:MAX_LIST_LENGTH]]
        left = len(value) - len(cut)
        return [*cut, f"{left} more in record.json"] if left else cut
    return value


def search_entry(search: Study) -> dict[str, object]:
    """Return a search as the page reads it: its trials, and the best values after each of them."""
    report = search.report
    return {
        "objectives": [
            {"name": name, "maximize": direction == "maximize", "best": best_so_far(report, name)}
            for name, direction in report["objectives"].items()
        ],
        "trials": [{**trial, "number": number} for number, trial in enumerate(report["trials"])],
    }


def table_entry(table: Table) -> dict[str, object]:
    """Return a table as the page reads it."""
    return {
        "name": table.file,
        "title": table.title,
        "stand_in": table.stand_in,
        "columns": [
            # Without digits, because the page formats the number with a decimal prefix.
            {
                "name": head.text,
                "unit": head.unit,
                "digits": DIGITS.get(head.unit),
                "signed": head.to_dense,
            }
            for head in table.columns
        ],
        "lines": [
            {
                "section": line.section,
                "label": line_text(line),
                "cells": [_cell_entry(cell) for cell in line.cells],
            }
            for line in table.lines
        ],
        "notes": list(table.notes),
    }


def _cell_entry(cell: TableCell) -> dict[str, object]:
    ours, theirs = cell.ours, cell.published
    return {
        "ours": None if ours is None else [ours.value, ours.stderr, *ours.runs[:1]],
        "theirs": theirs and [theirs.text, theirs.unit, TRUST_MARKS[theirs.trust], theirs.flag],
        "difference": cell.difference,
        "inside": cell.inside,
        "refusal": cell.refusal,
    }
