"""Where records live: `<results_dir>/runs/<id>/` with record.json, samples.parquet, config.yaml.

What a run needs to go on after a kill is in `<results_dir>/unfinished/<id>/` until it has its
record.

A record appears whole or not at all. Reading never fails for one bad file: it is set aside in
`unreadable` with the reason, and everything else is returned.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from bench.errors import UserError, nearest
from bench.records import atomic
from bench.records.journal import Journal
from bench.records.record import SCHEMA, Record, checksum
from bench.records.versions import READABLE, renewed

RECORD, SAMPLES, CONFIG = "record.json", "samples.parquet", "config.yaml"
ANSWERS = "answers.journal"


class Store:
    """The records below one results folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runs = root / "runs"
        self.unreadable: dict[str, str] = {}

    def ensure_writable(self) -> None:
        """Refuse a results folder that cannot be written, before any work is done.

        Raises:
            UserError: nobody can write there.
            OSError: there is no room on the disk just now.
        """
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            probe = self.runs / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            reason = error.strerror or str(error)
            raise UserError(f"results_dir={self.root}: cannot be written ({reason})") from None

    @contextmanager
    def claim(self, run_id: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold a run for this process; another one that wants the same run waits its turn.

        The system lets go of it when the process ends, however it ends. What a kill in the middle
        of a write left is put right. `on_wait` is called before any waiting.
        """
        locks = self.root / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{run_id}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if on_wait is not None:
                on_wait()
            lock.acquire()
        try:
            atomic.mend(self.folder(run_id))
            self._drop_what_is_done(run_id)
            yield
        finally:
            lock.release()

    def unfinished(self, run_id: str, process: int = 0) -> Path:
        """The folder where a run keeps what it goes on from after a kill, until it is recorded.

        Of processes that carry out a run together all but the first have a folder inside it.
        """
        folder = self.root / "unfinished" / run_id
        return folder / f"process{process}" if process else folder

    def _drop_what_is_done(self, run_id: str) -> None:
        """Remove what a kill between record and clean-up left: all of it is older than the record.

        What is newer belongs to a run that was told to replace the record, and goes on.
        """
        folder, record = self.unfinished(run_id), self.folder(run_id) / RECORD
        if not folder.exists() or not record.exists():
            return
        newest = max((path.stat().st_mtime_ns for path in folder.rglob("*")), default=0)
        if newest <= record.stat().st_mtime_ns:
            shutil.rmtree(folder)

    def journal(self, run_id: str, identity: str, process: int = 0) -> Journal:
        """Open a run's journal of answers, given by a network in the state `identity`."""
        return Journal(self.unfinished(run_id, process) / ANSWERS, identity)

    def folder(self, run_id: str) -> Path:
        """The folder of one record, whether it exists or not."""
        return self.runs / run_id

    def find(self, run_id: str) -> Record | None:
        """Return the record with exactly this id, or None; an unreadable one counts as absent."""
        path = self.folder(run_id) / RECORD
        return self._read(path) if path.parent.exists() else None

    def get(self, prefix: str) -> Record:
        """Return the record whose id starts with `prefix`; none or several is a `UserError`."""
        ids = self.ids()
        matches = [run_id for run_id in ids if run_id.startswith(prefix)]
        if len(matches) > 1:
            raise UserError(f"run {prefix!r} is ambiguous: {', '.join(matches)}")
        record = self.find(matches[0]) if matches else None
        if record is not None:
            return record
        if matches:
            raise UserError(f"run {matches[0]} cannot be read: {self.unreadable[matches[0]]}")
        close = nearest(prefix, ids)
        hint = f"did you mean {close!r}?" if close else f"{len(ids)} runs in {self.runs}"
        raise UserError(f"unknown run {prefix!r}: {hint}")

    def ids(self) -> list[str]:
        """Return the ids of all records, sorted."""
        if not self.runs.is_dir():
            return []
        return sorted(p.name for p in self.runs.iterdir() if not p.name.startswith("."))

    def all(self) -> list[Record]:
        """Return every readable record, oldest first."""
        records = [self.find(run_id) for run_id in self.ids()]
        return sorted((r for r in records if r is not None), key=lambda r: r.started)

    def set_aside(self, run_id: str) -> Path:
        """Move a record that cannot be read out of the way and return where it is now."""
        aside = self.root / "aside"
        aside.mkdir(exist_ok=True)
        names = (aside / (f"{run_id}.{n}" if n else run_id) for n in count())
        free = next(name for name in names if not name.exists())
        self.folder(run_id).rename(free)
        return free

    def write(self, record: Record, samples: Sequence[dict[str, Any]], config: str) -> Path:
        """Write one record with its samples and its config, atomically; return its folder.

        What the run kept to go on from is not needed any more then, and goes.
        """

        def fill(folder: Path) -> None:
            (folder / CONFIG).write_text(config)
            _write_samples(folder / SAMPLES, samples)
            (folder / RECORD).write_text(written(record))

        atomic.write_folder(self.folder(record.id), fill)
        shutil.rmtree(self.unfinished(record.id), ignore_errors=True)
        return self.folder(record.id)

    def _read(self, path: Path) -> Record | None:
        """Read one record file; a damaged or newer one is set aside with the reason."""
        try:
            return _parse(path.read_text())
        except (OSError, ValueError) as error:
            self.unreadable[path.parent.name] = str(error)
            return None


def written(record: Record) -> str:
    """Return the text of a record file: its values, and a checksum that tells damaged ones."""
    content = json.loads(record.model_dump_json())
    return json.dumps({**content, "checksum": checksum(content)}, indent=1) + "\n"


def _parse(text: str) -> Record:
    """Turn a record file into a record; a `ValueError` says in one line why that fails."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError("not a record: the file holds no JSON object")
    version = content.get("schema_version")
    if version not in READABLE:
        raise ValueError(f"its schema is version {version}, this program reads up to {SCHEMA}")
    wanted = content.pop("checksum", None)
    if wanted is not None and wanted != checksum(content):
        raise ValueError("it is not what was written: its checksum does not match")
    try:
        return renewed(Record(**content))
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise ValueError(f"not a record: {key}: {fault['msg'].lower()}") from None


def _write_samples(path: Path, samples: Sequence[dict[str, Any]]) -> None:
    """Write one row per scored sample; a run without samples leaves an empty table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pa.Table.from_pylist(list(samples))
    pq.write_table(rows, path, compression="zstd", write_page_checksum=True)
