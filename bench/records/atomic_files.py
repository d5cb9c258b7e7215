"""Atomic writes of files and folders: temporary in the same folder, flush, fsync, rename."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.errors import FULL_DISK_ERRNOS, UNWRITABLE_ERRNOS, Stopped, UserError


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees either the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic within one file system only.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            # Before the rename: otherwise a power cut could leave the new name with empty content.
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:  # Ctrl-C included: no temporary file may stay behind
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_folder(path: Path, fill: Callable[[Path], None], own: Collection[str] = ()) -> None:
    """Create a folder in one step: `fill` writes into a temporary one, which is then renamed.

    An existing folder is replaced: it is moved aside first and removed last. `own` names all files
    that `fill` may write; whatever else stands in the existing folder is moved to the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        fill(temporary)
        # A folder has to be synced as well: its entries are its content.
        for path_inside in temporary.rglob("*"):
            _sync(path_inside)
        # mkdtemp makes folders private (0700); records are shared like any other file.
        temporary.chmod(0o755)
        _swap(temporary, path, own)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def refuse_unwritable(key: str, target: Path, *, folder: bool = False) -> None:
    """Raise if a file, or a folder, cannot be written at `target`; called before any work.

    `key` is the option that the user gave. Nothing stays behind.

    Raises:
        UserError: it cannot be written, whatever is freed.
        OSError: the disk is full at the moment.
    """
    due, other = (target.is_dir, "file") if folder else (target.is_file, "folder")
    if os.path.lexists(target) and not due():
        raise UserError(f"{key}={target}: cannot be written (it is a {other} or something else)")
    parent = target if target.is_dir() else target.parent
    while not os.path.lexists(parent) and parent != parent.parent:
        parent = parent.parent
    try:
        # Writes a file, since permission bits do not tell (read-only mounts, quotas, root).
        with tempfile.TemporaryFile(dir=parent) as probe:
            probe.write(b"\0")
    except (OSError, ValueError) as error:  # ValueError: a name that no system takes
        if isinstance(error, OSError) and error.errno in FULL_DISK_ERRNOS:
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{key}={target}: cannot be written ({reason})") from None


def _swap(new: Path, path: Path, own: Collection[str]) -> None:
    """Rename `new` to `path`; delete an existing folder only once `new` is in place."""
    if not path.exists():
        new.rename(path)
        return
    # POSIX cannot replace a non-empty folder by a rename, so two renames are needed. A kill between
    # them leaves `path` missing; `repair_interrupted_write` brings the old folder back.
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".old-{path.name}."))
    path.rename(old / path.name)
    new.rename(path)
    _discard_old(old, path, own)


def repair_interrupted_write(path: Path, own: Collection[str]) -> None:
    """Clean up after a kill in the middle of `write_folder`; call with exclusive access to `path`.

    The old folder is restored if the kill came between the two renames. Of temporary folders only
    the files that `own` names are deleted: what else is there, somebody else has put there.
    """
    for old in _temporary_folders(path, f".old-{path.name}"):
        if not path.exists() and (old / path.name).is_dir():
            (old / path.name).rename(path)
        _discard_old(old, path, own)
    for unfinished in _temporary_folders(path, f".{path.name}"):
        _discard(unfinished, own)


def foreign_entries(folder: Path, own: Collection[str]) -> list[Path]:
    """Return the entries of a folder that are no regular files with one of these names."""
    known = (path for path in folder.iterdir() if path.name in own)
    files = {path for path in known if stat.S_ISREG(path.lstat().st_mode)}
    return sorted(path for path in folder.iterdir() if path not in files)


RANDOM_END = "[a-z0-9_]{8}"
"""The end of names that Python's tempfile makes."""


def _temporary_folders(path: Path, prefix: str) -> list[Path]:
    pattern = re.compile(rf"{re.escape(prefix)}\.{RANDOM_END}")
    found = (entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name))
    return sorted(entry for entry in found if stat.S_ISDIR(entry.lstat().st_mode))


def _discard_old(old: Path, path: Path, own: Collection[str]) -> None:
    """Move what is not `own` from the folder that `path` replaced to `path`; delete the rest."""
    replaced = old / path.name
    if replaced.is_dir() and not replaced.is_symlink():
        for entry in foreign_entries(replaced, own):
            if not os.path.lexists(path / entry.name):
                entry.rename(path / entry.name)
        _discard(replaced, own)
    _discard(old, ())


def _discard(folder: Path, own: Collection[str]) -> None:
    """Delete `own` files of a folder, and the folder if nothing else is in it."""
    # What is left takes a little space; `bench gc` names it.
    with suppress(OSError):
        for name in own:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def sync_folder(folder: Path) -> None:
    """Make a rename inside the folder survive a power cut."""
    # On POSIX a rename is an entry of the folder, which has to be synced in addition to the file.
    _sync(folder)


def _sync(path: Path) -> None:
    # By descriptor, since a folder cannot be opened as a Python file.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk_errors_as_stopped(results_dir: Path) -> Iterator[None]:
    """Convert out-of-space errors into `Stopped`, so that a later run can resume."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE_ERRNOS:
            raise
        raise Stopped(
            f"results_dir={results_dir}: {error.strerror}; "
            "free some space and run the same command to resume"
        ) from error
