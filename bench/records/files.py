"""Files of a results folder: atomic writes, and reads of untrusted files.

A file is written to a temporary in the same folder, flushed, synced and renamed. Files that are
read may be untrusted: reading never blocks, follows a link or fills the memory. Anything that is
not a regular file, or is too large, is refused before it is read.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from bench.errors import FULL_DISK_ERRNOS, UNWRITABLE_ERRNOS, Stopped, UserError
from bench.records.json_values import MAX_INTEGER, parse_json
from bench.ui import clean, warn

if TYPE_CHECKING:
    import pyarrow as pa


MAX_JSON_BYTES = 64 * 2**20
MAX_TABLE_BYTES = 2**33
"""Maximum size of an unpacked table, which compression can hide in a small file."""
SAMPLE_COLUMNS = {
    **dict.fromkeys(
        ("task", "filter", "doc_hash", "prompt_hash", "image_hash", "prompt", "response"), "text"
    ),
    **dict.fromkeys(
        ("doc_id", "n_tokens", "probability", "acc", "acc_norm", "exact_match"), "numbers"
    ),
    "choices": "lists of text",
    "loglikelihoods": "lists of numbers",
}
"""Types of the columns of `samples.parquet`; metrics add columns of numbers."""
_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def read_regular_file(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ValueError: it is not a regular file, or too large.
    """
    _require_regular(path, path.lstat().st_mode)
    # Without blocking or following links, because the file may be replaced between the two calls.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        _require_regular(path, os.fstat(handle).st_mode)
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it is larger than {limit:,} bytes")
    return content


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path.name} is {_KINDS.get(stat.S_IFMT(mode), 'no regular file')}")


def folder_entries(folder: Path) -> list[Path]:
    """Return the sorted entries of a folder of results; none if it does not exist.

    Raises:
        UserError: it cannot be listed, for example because it is a link to a disk that is not
            mounted. Its files would otherwise look deleted.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not folder.is_symlink():
            return []
        reason = error.strerror or str(error)
    raise UserError(f"{folder}: cannot be read as a folder ({reason})")


def read_json(path: Path) -> object:
    """Return the content of a JSON file; raises as `read_regular_file` and `parse_json` do."""
    return parse_json(read_regular_file(path))


def reason_of(error: Exception) -> str:
    """Return the reason why a file was not read, in one line without control characters."""
    reason = error.strerror if isinstance(error, OSError) else None
    return clean((reason or str(error) or type(error).__name__).splitlines()[0])


MAX_WARNINGS = 20
"""Maximum number of warnings about files of one folder."""
_warned: dict[Path, set[tuple[str, str]]] = {}


def warn_once(path: Path, reason: str | Exception, among: Path | None = None) -> None:
    """Warn that a file or folder is left out, once per command.

    `among`, by default the folder around it, is that whose number of warnings is limited.
    """
    text = reason_of(reason) if isinstance(reason, Exception) else reason
    among = among or path.parent
    known = _warned.setdefault(among, set())
    if (str(path), text) in known:
        return
    known.add((str(path), text))
    # Warnings about thousands of records would hide the output of the command.
    if len(known) <= MAX_WARNINGS:
        warn(f"{path} is left out: {text}")
    elif len(known) == MAX_WARNINGS + 1:
        warn(f"more files of {among} are left out; the first {MAX_WARNINGS} are named above")


def refuse_unstorable(node: object, key: str) -> None:
    """Raise if a value cannot be stored in a record and read again.

    Raises:
        UserError: names the key, the value, and what can be stored.
    """
    if isinstance(node, Mapping):
        for name, inner in node.items():
            if not isinstance(name, str):
                raise UserError(f"{key}.{name}: the name {name!r} is not a text: quote it")
            refuse_unstorable(name, f"the name {key}.{name}")
            refuse_unstorable(inner, f"{key}.{name}" if key else name)
    elif isinstance(node, list | tuple):
        for place, inner in enumerate(node):
            refuse_unstorable(inner, f"{key}.{place}")
    elif isinstance(node, float) and not math.isfinite(node):
        raise UserError(f"{key}={node}: records can store only finite numbers")
    elif isinstance(node, int) and abs(node) > MAX_INTEGER:
        raise UserError(f"{key}={str(node)[:20]}...: records can store only 64-bit integers")
    elif isinstance(node, str) and not node.isprintable() and _has_controls(node):
        raise UserError(f"{key}={node!r}: control characters and half characters cannot be stored")


def _has_controls(text: str) -> bool:
    controls = (ord(character) for character in text if character not in "\n\t\r")
    return any(code < 32 or 127 <= code < 160 or 0xD800 <= code < 0xE000 for code in controls)


def read_table(path: Path, kinds: Mapping[str, str]) -> pa.Table:
    """Return a Parquet table; `kinds` are the types of columns, if they are present.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ValueError: it is not such a table; the message is one sentence.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = read_regular_file(path, MAX_TABLE_BYTES)
    try:
        # Without page checksums, a flipped bit in a value would not be noticed.
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        groups = range(file.metadata.num_row_groups)
        size = sum(file.metadata.row_group(group).total_byte_size for group in groups)
        if not 0 <= size <= MAX_TABLE_BYTES:
            raise ValueError(f"it would fill {size:,} bytes of memory")
        table = file.read()
        table.validate(full=True)
    except (OSError, OverflowError, MemoryError, pa.ArrowException) as error:
        raise ValueError((str(error) or type(error).__name__).splitlines()[0]) from None
    for field in table.schema:
        kind = kinds.get(field.name)
        if kind is not None and not _holds(field.type, kind):
            raise ValueError(f"its column {field.name!r} holds {field.type}, not {kind}")
    return table


def _holds(kind: pa.DataType, wanted: str) -> bool:
    import pyarrow as pa

    if pa.types.is_null(kind):
        return True
    if wanted.startswith("lists of "):
        listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        return listed and _holds(kind.value_type, wanted.removeprefix("lists of "))
    if wanted == "text":
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees either the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only within a file system.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            # Before the rename, because a power cut could otherwise leave an empty file.
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:  # Includes Ctrl-C, so that no temporary file is left.
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_folder(path: Path, fill: Callable[[Path], None], own: Collection[str] = ()) -> None:
    """Create a folder atomically: `fill` writes into a temporary one, which is then renamed.

    An existing folder is replaced: it is moved aside first and removed last. `own` names all files
    that `fill` may write; other files of the existing folder are moved to the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        fill(temporary)
        # Folders are synced as well, so that their new entries survive a power cut.
        for path_inside in temporary.rglob("*"):
            _sync(path_inside)
        # mkdtemp makes folders private (0700); records are shared like any other file.
        temporary.chmod(0o755)
        _swap(temporary, path, own)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


@contextmanager
def file_locked(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Lock a file for this process in the `with` block; `on_wait` is called before waiting.

    The kernel releases the lock when the process ends, however it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if on_wait is not None:
            on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def refuse_unwritable(key: str, target: Path, *, folder: bool = False) -> None:
    """Raise if a file, or a folder, cannot be written at `target`; called before any work.

    `key` is the user's option, for the message.

    Raises:
        UserError: it cannot be written for a reason other than a full disk.
        OSError: the disk is full.
    """
    due, other = (target.is_dir, "file") if folder else (target.is_file, "folder")
    if os.path.lexists(target) and not due():
        raise UserError(f"{key}={target}: cannot be written (it is a {other} or something else)")
    parent = target if target.is_dir() else target.parent
    while not os.path.lexists(parent) and parent != parent.parent:
        parent = parent.parent
    try:
        # Writes a file, because permission bits do not show read-only mounts or quotas.
        with tempfile.TemporaryFile(dir=parent) as probe:
            probe.write(b"\0")
    except (OSError, ValueError) as error:  # ValueError: an invalid name.
        if isinstance(error, OSError) and error.errno in FULL_DISK_ERRNOS:
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{key}={target}: cannot be written ({reason})") from None


def refuse_filled_folder(target: Path) -> None:
    """Raise unless a command can write a folder at `target`, which must be absent or empty.

    Raises:
        UserError, OSError: see `refuse_unwritable`, or the folder is not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder: choose a different one")
    refuse_unwritable("DIR", target, folder=True)


def _swap(new: Path, path: Path, own: Collection[str]) -> None:
    """Rename `new` to `path`; delete an existing folder only once `new` is in place."""
    if not path.exists():
        new.rename(path)
        return
    # POSIX cannot replace a non-empty folder by a rename, so two renames are needed. After a kill
    # between them `path` is missing; `repair_interrupted_write` restores the old folder.
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".old-{path.name}."))
    path.rename(old / path.name)
    new.rename(path)
    _discard_old(old, path, own)


def repair_interrupted_write(path: Path, own: Collection[str]) -> None:
    """Clean up after a kill in the middle of `write_folder`; call with exclusive access to `path`.

    The old folder is restored if the kill was between the two renames. Only the files named in
    `own` are deleted from temporary folders, because others were written by somebody else.
    """
    for old in _temporary_folders(path, f".old-{path.name}"):
        if not path.exists() and (old / path.name).is_dir():
            (old / path.name).rename(path)
        _discard_old(old, path, own)
    for unfinished in _temporary_folders(path, f".{path.name}"):
        _discard(unfinished, own)


def foreign_entries(folder: Path, own: Collection[str]) -> list[Path]:
    """Return the entries of a folder other than regular files named in `own`.

    Names may be `FOLDER/NAME`; such a folder is searched, while any other folder is itself an
    entry.
    """
    inner: dict[str, list[str]] = {}
    for name in own:
        first, _, rest = name.partition("/")
        inner.setdefault(first, []).extend([rest] if rest else [])
    found = []
    for path in sorted(folder.iterdir()):
        kind, below = path.lstat().st_mode, inner.get(path.name)
        if below and stat.S_ISDIR(kind):
            found += foreign_entries(path, below)
        elif below is None or below or not stat.S_ISREG(kind):
            found.append(path)
    return found


RANDOM_END = "[a-z0-9_]{8}"
"""Pattern of the random end of names made by Python's tempfile."""


def _temporary_folders(path: Path, prefix: str) -> list[Path]:
    if not path.parent.is_dir():
        return []
    pattern = re.compile(rf"{re.escape(prefix)}\.{RANDOM_END}")
    found = (entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name))
    return sorted(entry for entry in found if stat.S_ISDIR(entry.lstat().st_mode))


def _discard_old(old: Path, path: Path, own: Collection[str]) -> None:
    """Move what is not `own` from the folder that `path` replaced to `path`; delete the rest."""
    replaced = old / path.name
    if replaced.is_dir() and not replaced.is_symlink():
        for entry in foreign_entries(replaced, own):
            place = path / entry.relative_to(replaced)
            if not os.path.lexists(place):
                place.parent.mkdir(exist_ok=True)
                entry.rename(place)
        _discard(replaced, own)
    _discard(old, ())


def _discard(folder: Path, own: Collection[str]) -> None:
    """Delete `own` files of a folder, and the folder if nothing else is in it."""
    # Remaining files take little space; `bench gc` lists them.
    with suppress(OSError):
        inner = {(folder / name).parent for name in own} - {folder}
        # A link instead of a folder may lead to files of somebody else.
        linked = {path for path in inner if path.is_symlink()}
        for name in own:
            if (folder / name).parent not in linked:
                (folder / name).unlink(missing_ok=True)
        for path in inner - linked:
            if path.is_dir():
                path.rmdir()
        folder.rmdir()


def sync_folder(folder: Path) -> None:
    """Make a rename inside the folder survive a power cut."""
    # On POSIX a rename changes the folder, which must be synced in addition to the file.
    _sync(folder)


def _sync(path: Path) -> None:
    # With a descriptor, because a folder cannot be opened as a Python file.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_errors_as_stopped(results_dir: Path) -> Iterator[None]:
    """Convert errors of a disk that accepts no more data into `Stopped`, so that a run can resume.

    A folder of results whose permissions are taken away meanwhile is such a disk.
    """
    try:
        yield
    except OSError as error:
        forbidden = isinstance(error, PermissionError) and Path(
            os.path.abspath(str(error.filename))  # noqa: PTH100  # a link need not be followed
        ).is_relative_to(results_dir.absolute())
        if error.errno not in UNWRITABLE_ERRNOS and not forbidden:
            raise
        cure = "allow writing to it" if forbidden else "free some space"
        raise Stopped(
            f"results_dir={results_dir}: {error.strerror}; {cure} and run the same command "
            "to resume"
        ) from error
