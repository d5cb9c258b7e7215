"""Store of records: `<results_dir>/runs/<id>/` with record.json, samples.parquet, config.yaml.

The state that a run resumes from is in `<results_dir>/unfinished/<id>/` until its record is
written.

Records are written atomically. A damaged file does not prevent reading: its fault is noted in
`unreadable`, and all other records are returned.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from bench.errors import UserError, nearest, unknown_name
from bench.records import files
from bench.records.files import read_regular_file, reason_of, warn_once
from bench.records.journal import Journal
from bench.records.record import JsonObject, Record
from bench.records.record_file import parse_record, serialize_record

RECORD, SAMPLES, CONFIG = "record.json", "samples.parquet", "config.yaml"
WEIGHTS = "weights"
RECORD_FILES = (RECORD, SAMPLES, CONFIG, f"{WEIGHTS}/config.json", f"{WEIGHTS}/model.safetensors")
"""All files that are written into the folder of a record."""
RESPONSES = "responses.journal"
LOCKS, UNFINISHED = "locks", "unfinished"
LATEST = "latest"
RUN_METADATA = "slimbench.run"
"""Key of a run's id in the metadata of its samples."""
MARKER = ".slimbench"
MARKER_TEXT = b"Results of slimbench. `bench gc` cleans up folders that hold this file.\n"


class Store:
    """The records in one results folder."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.runs = self.root / "runs"
        self.unreadable: dict[str, str] = {}

    def ensure_writable(self) -> None:
        """Raise unless the results folder can be written; called before any work is done.

        Raises:
            UserError: it cannot be written for a reason other than a full disk.
            OSError: the disk is full.
        """
        for folder in (self.runs, self.root / LOCKS, self.root / UNFINISHED):
            if os.path.lexists(folder) and not os.path.isdir(folder):  # noqa: PTH112  # never raises
                raise UserError(
                    f"results_dir={self.root}: cannot be written ({folder.name} in it is a file, a "
                    "link that leads nowhere, or something else): move it away"
                )
        try:
            # Writes a file, because permission bits do not show read-only mounts or quotas.
            self.runs.mkdir(parents=True, exist_ok=True)
            self._mark()
            probe = self.runs / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            # A full disk is not the user's mistake: the same command resumes once there is space.
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            reason = error.strerror or str(error)
            raise UserError(f"results_dir={self.root}: cannot be written ({reason})") from None

    @contextmanager
    def claim(self, run_id: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Lock a run for this process; a second process with the same run waits.

        The kernel releases the lock when the process ends, however it ends. An interrupted write
        is repaired after locking. `on_wait` is called before waiting.
        """
        # Outside the run's folder, which is replaced as a whole.
        with files.file_locked(self.root / LOCKS / f"{run_id}.lock", on_wait):
            files.repair_interrupted_write(self.folder(run_id), RECORD_FILES)
            self._remove_leftovers(run_id)
            yield

    def unfinished(self, run_id: str, process: int = 0) -> Path:
        """Return the folder with the state that a run resumes from until its record is written.

        If a run has several processes, all but the first use a subfolder of it.
        """
        folder = self.root / UNFINISHED / run_id
        return folder / f"process{process}" if process else folder

    def _remove_leftovers(self, run_id: str) -> None:
        """Remove what a kill after writing the record, but before cleaning up, left behind.

        Such files are older than the record. Newer ones belong to an unfinished run that will
        replace the record (force=true), and are kept so that this run can resume.
        """
        folder, record = self.unfinished(run_id), self.folder(run_id) / RECORD
        if not folder.exists() or not record.exists():
            return
        newest = max((path.lstat().st_mtime_ns for path in folder.rglob("*")), default=0)
        if newest <= record.stat().st_mtime_ns:
            self._remove_unfinished(run_id)

    def _remove_unfinished(self, run_id: str) -> None:
        """Remove the unfinished state of a run, unless a link leads to it."""
        folder = self.unfinished(run_id)
        # A link may lead to a folder that this program did not write.
        if not folder.parent.is_symlink() and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)

    def journal(self, run_id: str, identity: str, process: int = 0) -> Journal:
        """Open a run's journal of responses; `identity` is the hash of the network's weights."""
        return Journal(self.unfinished(run_id, process) / RESPONSES, identity)

    def folder(self, run_id: str) -> Path:
        """Return the folder of a record, which need not exist."""
        return self.runs / run_id

    def find(self, run_id: str) -> Record | None:
        """Return the record with exactly this id, or None if it is absent or unreadable."""
        path = self.folder(run_id) / RECORD
        return self._read(path) if os.path.lexists(path.parent) else None

    def weights(self, record: Record) -> Path | None:
        """Return the folder of the network saved with a run, or None if there is none."""
        folder = self.folder(record.id) / WEIGHTS
        return folder if record.kept_weights is not None and folder.is_dir() else None

    def get(self, prefix: str) -> Record:
        """Return the record whose id starts with `prefix`.

        `latest` is the newest record, and `latest:camera_p` the newest one of that method, so that
        a script can refer to a run that does not exist yet.

        Raises:
            UserError: no id or more than one starts with `prefix`, or the record is unreadable.
        """
        word, colon, label = prefix.partition(":")
        # Every id starts with the empty string, which would match a single run.
        if not prefix or (colon and not label):
            raise UserError(
                f"the name of a run is {prefix!r}, as with an unset shell variable: give the "
                f"beginning of an id, {LATEST}, or {LATEST}:METHOD"
            )
        if word == LATEST:
            return self._latest(label)
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

    def _latest(self, label: str) -> Record:
        """Return the newest record, of one method if `label` is not empty."""
        records = self.all()
        found = [record for record in records if label in ("", record.label, record.family)]
        if found:
            return found[-1]
        if not records:
            raise UserError(f"{LATEST}: there are no runs in {self.runs}")
        raise unknown_name("method of a run", label, {record.family for record in records})

    def ids(self) -> list[str]:
        """Return the ids of all records, sorted; raises as `folder_entries` does."""
        # Names with a dot are temporary folders of writes in progress.
        names = (path.name for path in files.folder_entries(self.runs))
        return [name for name in names if not name.startswith(".")]

    def all(self) -> list[Record]:
        """Return every readable record, oldest first; warn about each of the others."""
        records = [self.find(run_id) for run_id in self.ids()]
        for run_id, reason in self.unreadable.items():
            warn_once(self.folder(run_id), reason)
        return sorted((r for r in records if r is not None), key=lambda r: r.started)

    def move_aside(self, run_id: str) -> Path:
        """Move an unreadable record to `aside/` and return its new path."""
        aside = self.root / "aside"
        aside.mkdir(exist_ok=True)
        names = (aside / (f"{run_id}.{n}" if n else run_id) for n in count())
        free = next(name for name in names if not name.exists())
        self.folder(run_id).rename(free)
        return free

    def write(
        self,
        record: Record,
        samples: Sequence[JsonObject],
        config: str,
        save_weights: Callable[[Path], None] | None = None,
    ) -> Path:
        """Write one record with samples and config atomically; return its folder.

        `save_weights` writes the run's network into the folder passed to it. The run's unfinished
        state is removed afterwards.
        """

        def fill(folder: Path) -> None:
            (folder / CONFIG).write_text(config)
            _write_samples(folder / SAMPLES, samples, record.id)
            if save_weights is not None:
                save_weights(folder / WEIGHTS)
            text = serialize_record(record)
            # Read back, because an unreadable record is lost and every command would warn about it.
            parse_record(text.encode())
            (folder / RECORD).write_text(text)

        self._mark()
        # In this order, so that a kill in between leaves both the record and the unfinished state.
        files.write_folder(self.folder(record.id), fill, RECORD_FILES)
        self._remove_unfinished(record.id)
        return self.folder(record.id)

    def _mark(self) -> None:
        """Write the file by which `bench gc` recognises a results folder."""
        marker = self.root / MARKER
        if not marker.exists():
            files.write_bytes(marker, MARKER_TEXT)

    def _read(self, path: Path) -> Record | None:
        """Read one record file; note the reason in `unreadable` if it is damaged or too new."""
        run_id = path.parent.name
        try:
            if path.parent.is_symlink():
                raise ValueError("its folder is a link")
            record = parse_record(read_regular_file(path))
            # A record under another name would be found twice, or overwrite its namesake.
            if record.id != run_id:
                raise ValueError(f"it is the record of run {record.id[:40]!r}")
        except (OSError, ValueError) as error:
            self.unreadable[run_id] = reason_of(error)
            return None
        return record


def _write_samples(path: Path, samples: Sequence[JsonObject], run_id: str) -> None:
    """Write one row per scored sample; a run without samples gets an empty table.

    The id of the run is stored in the file, so that it is not read as that of a different run.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pa.Table.from_pylist(list(samples)).replace_schema_metadata({RUN_METADATA: run_id})
    # Given a path, pyarrow would expand `~` and interpret a scheme such as `s3:`.
    with path.open("wb") as file:
        pq.write_table(rows, file, compression="zstd", write_page_checksum=True)
