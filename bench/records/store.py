"""Store of records: `<results_dir>/runs/<id>/` with record.json, samples.parquet, config.yaml.

What a run needs to resume after a kill is in `<results_dir>/unfinished/<id>/` until its record is
written.

A record is written atomically. One bad file does not break reading: its reason is kept in
`unreadable`, and all other records are returned.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from bench.errors import UserError, nearest, unknown_name
from bench.records import files
from bench.records.files import read_regular_file, reason_of, warn_once
from bench.records.journal import Journal
from bench.records.json_values import is_surely_storable, parse_json
from bench.records.leaves import first_fault
from bench.records.migrations import READABLE_SCHEMAS, migrate
from bench.records.record import SCHEMA, JsonObject, Record, checksum

RECORD, SAMPLES, CONFIG = "record.json", "samples.parquet", "config.yaml"
WEIGHTS = "weights"
RECORD_FILES = (RECORD, SAMPLES, CONFIG, f"{WEIGHTS}/config.json", f"{WEIGHTS}/model.safetensors")
"""All that is written into the folder of a record."""
RESPONSES = "responses.journal"
LATEST = "latest"
MARKER = ".slimbench"
MARKER_TEXT = b"Results of slimbench. `bench gc` cleans up folders that hold this file.\n"


class Store:
    """The records in one results folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runs = root / "runs"
        self.unreadable: dict[str, str] = {}

    def ensure_writable(self) -> None:
        """Check that the results folder is writable, before any work is done.

        Raises:
            UserError: the folder cannot be written.
            OSError: the disk is full at the moment.
        """
        try:
            # Writes a file, since permission bits do not tell (read-only mounts, quotas, root).
            self.runs.mkdir(parents=True, exist_ok=True)
            self._mark()
            probe = self.runs / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            # A full disk is no mistake of the user: the same command can resume once there is room.
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
            files.repair_interrupted_write(self.folder(run_id), RECORD_FILES)
            self._remove_leftovers(run_id)
            yield
        finally:
            lock.release()

    def unfinished(self, run_id: str, process: int = 0) -> Path:
        """Return the folder with what a run needs to resume, until its record is written.

        Of several processes of one run, all but the first have a folder inside it.
        """
        folder = self.root / "unfinished" / run_id
        return folder / f"process{process}" if process else folder

    def _remove_leftovers(self, run_id: str) -> None:
        """Remove leftovers of a kill between writing the record and cleaning up.

        Leftovers are older than the record. Anything newer belongs to an unfinished run that is to
        replace the record (force=true), and stays so that this run can resume.
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
        # Beyond a link may lie anything of the same name, which this program did not write.
        if not folder.parent.is_symlink() and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)

    def journal(self, run_id: str, identity: str, process: int = 0) -> Journal:
        """Open a run's journal of responses of the network whose weights are `identity`."""
        return Journal(self.unfinished(run_id, process) / RESPONSES, identity)

    def folder(self, run_id: str) -> Path:
        """Return the folder of one record, whether it exists or not."""
        return self.runs / run_id

    def find(self, run_id: str) -> Record | None:
        """Return the record with exactly this id, or None if it is absent or unreadable."""
        path = self.folder(run_id) / RECORD
        return self._read(path) if os.path.lexists(path.parent) else None

    def weights(self, record: Record) -> Path | None:
        """Return the folder with the network that a run kept, None if there is none."""
        folder = self.folder(record.id) / WEIGHTS
        return folder if record.kept_weights is not None and folder.is_dir() else None

    def get(self, prefix: str) -> Record:
        """Return the record whose id starts with `prefix`.

        `latest` is the newest record, and `latest:camera_p` the newest of that method, so that a
        command can be written before the run that it reads.

        Raises:
            UserError: no id or several start with it, or the record is unreadable.
        """
        word, colon, label = prefix.partition(":")
        # Nothing is the beginning of every id, so a single run would be found.
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
        """Return the newest record, of a method if `label` is not empty."""
        records = self.all()
        found = [record for record in records if label in ("", record.label, record.family)]
        if found:
            return found[-1]
        if not records:
            raise UserError(f"{LATEST}: there are no runs in {self.runs}")
        raise unknown_name("method of a run", label, {record.family for record in records})

    def ids(self) -> list[str]:
        """Return the ids of all records, sorted."""
        if not self.runs.is_dir():
            return []
        # Names with a dot are temporary folders of writes in progress.
        return sorted(p.name for p in self.runs.iterdir() if not p.name.startswith("."))

    def all(self) -> list[Record]:
        """Return every readable record, oldest first; each of the others is named in a warning."""
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

        `save_weights` writes the run's network into the folder it is given. The run's unfinished
        state is no longer needed and is removed.
        """

        def fill(folder: Path) -> None:
            (folder / CONFIG).write_text(config)
            _write_samples(folder / SAMPLES, samples)
            if save_weights is not None:
                save_weights(folder / WEIGHTS)
            text = serialize_record(record)
            # What cannot be read would be lost, and be in everybody's way.
            _parse_record(text.encode())
            (folder / RECORD).write_text(text)

        self._mark()
        # In this order: a kill in between leaves leftovers, never a run with neither.
        files.write_folder(self.folder(record.id), fill, RECORD_FILES)
        self._remove_unfinished(record.id)
        return self.folder(record.id)

    def _mark(self) -> None:
        """Write the file by which `bench gc` knows a folder as one of slimbench's."""
        marker = self.root / MARKER
        if not marker.exists():
            files.write_bytes(marker, MARKER_TEXT)

    def _read(self, path: Path) -> Record | None:
        """Read one record file; note the reason in `unreadable` if it is damaged or too new."""
        run_id = path.parent.name
        try:
            if path.parent.is_symlink():
                raise ValueError("its folder is a link")
            record = _parse_record(read_regular_file(path))
            # A record under another name would be found twice, or overwrite its namesake.
            if record.id != run_id:
                raise ValueError(f"it is the record of run {record.id[:40]!r}")
        except (OSError, ValueError) as error:
            self.unreadable[run_id] = reason_of(error)
            return None
        return record


def serialize_record(record: Record) -> str:
    """Return the text of a record file: its values, and a checksum that reveals damage."""
    return with_checksum(json.loads(record.model_dump_json()))


def with_checksum(content: JsonObject) -> str:
    """Return the text of a JSON object with two checksums: of its values, and of the text."""
    text = json.dumps({**content, "checksum": checksum(content)}, indent=1)
    return f'{text.removesuffix(_END)}{_TEXT_CHECKSUM}{_digest(text.encode())}"{_END}\n'


_TEXT_CHECKSUM = ',\n "text_checksum": "'
_END = "\n}"


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _parse_record(text: bytes) -> Record:
    """Parse and validate the text of a record file; a `ValueError` gives the reason in one line."""
    # A record as this program writes it is parsed once; whatever else it is, the other way tells.
    if is_surely_storable(text) and _is_as_written(text):
        with suppress(ValidationError):
            found = _RecordFile.model_validate_json(text, strict=True)
            # A record that does not name its schema is none, whatever the default is.
            if found.schema_version == SCHEMA and "schema_version" in found.model_fields_set:
                return _without_checksum(found)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError("not a record: the file holds no JSON object")
    version = content.get("schema_version")
    if version not in READABLE_SCHEMAS:
        raise ValueError(f"its schema is version {version}, this program reads up to {SCHEMA}")
    # Checked before validation and migration, which would change what was written. By the values,
    # since other programs may have reformatted the file.
    content.pop("text_checksum", None)
    wanted = content.pop("checksum", None)
    if wanted is not None and wanted != checksum(content):
        raise ValueError("its checksum does not match: the file was changed or damaged")
    try:
        # Strict: a number is no text. In JSON, where a list may stand for a tuple.
        return Record.model_validate_json(json.dumps(migrate(content)), strict=True)
    except ValidationError as error:
        raise ValueError(f"not a record: {first_fault(error)}") from None


def _is_as_written(text: bytes) -> bool:
    """Tell whether a file is, byte by byte, what `serialize_record` wrote."""
    # By its bytes: a canonical form of the values takes as long as all other reading.
    before, found, after = text.rpartition(_TEXT_CHECKSUM.encode())
    return bool(found) and after == f'{_digest(before + _END.encode())}"{_END}\n'.encode()


def _without_checksum(stored: _RecordFile) -> Record:
    values = {name: getattr(stored, name) for name in Record.model_fields}
    own = {"checksum", "text_checksum"}
    return Record.model_construct(stored.model_fields_set - own, **values)


class _RecordFile(Record):
    """A record as its file has it."""

    checksum: str | None = None
    text_checksum: str | None = None


def _write_samples(path: Path, samples: Sequence[JsonObject]) -> None:
    """Write one row per scored sample; a run without samples gets an empty table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pa.Table.from_pylist(list(samples))
    # Of a path, pyarrow would expand a `~` and read a scheme, as in `s3:`.
    with path.open("wb") as file:
        pq.write_table(rows, file, compression="zstd", write_page_checksum=True)
