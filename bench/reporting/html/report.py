"""HTML report from top to bottom: records -> leaderboard -> details and samples -> page -> file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.errors import UserError
from bench.records import Record, Store
from bench.records.atomic import write_bytes
from bench.reporting.board import Board, Row, board
from bench.reporting.html import page, samples
from bench.reporting.html.details import details
from bench.reporting.html.samples import Share
from bench.reporting.html.tables import PaperTable, described
from bench.reporting.tables.building import tables_of

# Records per compressed chunk: the browser unpacks a chunk to show one run, so a chunk must be
# small to open fast and large to compress well.
RUNS_A_CHUNK = 50


@dataclass(frozen=True)
class Written:
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
    share: Share | None = None,
    tables: Callable[[Sequence[Record]], Iterable[PaperTable]] = tables_of,
) -> Written:
    """Write one HTML file over all records of a results folder, atomically.

    `out` defaults to `report.html` in the folder; `share` limits the embedded samples; `tables`
    builds the papers' tables from the records.

    Raises:
        UserError: the folder does not exist, or the file cannot be written.
    """
    if not results_dir.is_dir():
        raise UserError(f"results_dir={results_dir}: no such folder, so there are no records")
    store, share = Store(results_dir), share or Share()
    records = store.all()
    runs = board(records)
    asked = list(samples.chunks(runs, store, share))
    content = page.render(
        index=_index(runs, store, share, asked, [described(table) for table in tables(records)]),
        details=[[details(record) for record in few] for few in _chunks(runs)],
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
    return Written(path, len(records), shown, len(content))


def _chunks(runs: Board) -> list[list[Record]]:
    """Return the records in the order of the leaderboard, in chunks."""
    records = [row.record for row in runs.rows]
    return [records[at : at + RUNS_A_CHUNK] for at in range(0, len(records), RUNS_A_CHUNK)]


def _index(
    runs: Board,
    store: Store,
    share: Share,
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
            _run(row, at // RUNS_A_CHUNK, place.get(row.record.id))
            for at, row in enumerate(runs.rows)
        ],
        "tables": tables,
        "share": asdict(share),
        "unreadable": store.unreadable,
    }


def _run(row: Row, chunk: int, samples_chunk: int | None) -> dict[str, Any]:
    """Return one run as the leaderboard and the plots read it."""
    record = row.record
    return {
        "id": record.id,
        "setting": row.setting,
        "label": record.label,
        "family": row.family,
        "saving": row.saving,
        "real": row.real,
        "started": record.started[:19],
        "group": record.group,
        "dense": row.dense,
        "values": row.values,
        "costs": row.costs,
        "kept": row.retention,
        "chunk": chunk,
        "samples": samples_chunk,
    }
