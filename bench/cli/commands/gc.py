"""`bench gc`: remove files of slimbench in a results folder that are not needed.

A results folder is recognised by a marker file and its entries by their names; files that slimbench
may not have written are kept. Records, samples and studies are never removed, nor is anything that
is younger than an hour, locked, queued, written by a newer version, or reached through a link.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from bench.errors import EXIT_DONE, UserError
from bench.records import Store
from bench.records.files import RANDOM_END, folder_entries, foreign_entries, reason_of
from bench.records.store import MARKER, RECORD, RECORD_FILES
from bench.sweeps import sweep_jobs
from bench.sweeps.plan import SWEEPS, load_plan
from bench.ui import note, print_rows, warn

MIN_AGE_SECONDS = 3600.0
_RUN = "[0-9a-f]{12}"
_HALF_WRITTEN_RUN = re.compile(rf"\.(?P<old>old-)?(?P<run>{_RUN})\.{RANDOM_END}")
_HALF_WRITTEN_FILE = re.compile(
    rf"\.(?:plan\.json|study\.json|\d{{5,9}}\.(?:json|log))\.{RANDOM_END}"
)
_PROBE = re.compile(r"\.probe-\d+")
_SWEEP = re.compile(r"\d{8}-\d{6}-\d{6}")
_SWEEP_FILES = re.compile(r"plan\.json(\.lock)?|study\.json|pareto\.(csv|svg)|jobs|submitit")
_QUEUE_FILES = re.compile(r"\d+(_\d+)*_\w+\.(pkl|sh|out|err)|\.?\w*[0-9a-f]{32}\.(pkl|sh)")
"""Files that submitit writes for a job, and for all jobs of an array."""
_JOB_FILES = re.compile(r"\d{5,9}\.(json|lock|log)")
_FOLDERS = ("runs", "locks", "tracked", "unfinished", SWEEPS)


@dataclass(frozen=True)
class Entry:
    """A file or folder in a results folder, by its relative path, and why it is removed or kept.

    `stamp` identifies its content, so that exactly what was listed is removed.
    """

    path: str
    reason: str
    bytes: int = 0
    stamp: tuple[int, ...] = ()


@dataclass(frozen=True)
class Findings:
    """Entries that can be removed, largest first, and unneeded ones that are kept."""

    removable: tuple[Entry, ...]
    kept: tuple[Entry, ...]


class _Keep(Exception):
    """Raised if an entry must be kept; the message is the reason."""


def find_unreferenced(results_dir: Path) -> Findings:
    """Return the entries of a results folder that are not needed.

    Raises:
        UserError: the folder does not exist, was not written by slimbench, or cannot be listed.
    """
    if not results_dir.is_dir():
        raise UserError(f"--results-dir={results_dir}: no such folder")
    if not _is_regular(results_dir / MARKER):
        raise UserError(
            f"--results-dir={results_dir} has no file {MARKER}, which `bench run` writes into "
            "every results folder: nothing in it is removed"
        )
    # What refers to a record is removed if the record is gone, not if it cannot be listed.
    Store(results_dir).ids()
    removable: list[Entry] = []
    kept: list[Entry] = []
    for name in _FOLDERS:
        folder = results_dir / name
        if folder.is_symlink():
            kept.append(Entry(name, "a link, and what it leads to may be anything"))
            continue
        for path in folder_entries(folder):
            # The parts of a sweep come after the sweep, and are removed with it.
            whole = False
            for place in _places(path, name):
                if whole:
                    break
                relative = str(place.relative_to(results_dir))
                try:
                    reason = _reason_to_remove(place, results_dir)
                    if reason is not None:
                        removable.append(_measured(place, relative, reason))
                        whole = whole or place == path
                except _Keep as found:
                    kept.append(Entry(relative, str(found)))
                except OSError as error:
                    kept.append(Entry(relative, reason_of(error)))
    removable.sort(key=lambda entry: (-entry.bytes, entry.path))
    return Findings(tuple(removable), tuple(kept))


def _places(path: Path, folder: str) -> Iterator[Path]:
    """Yield an entry of a folder and, for a sweep, its parts that can be removed separately."""
    yield path
    if folder != SWEEPS or path.is_symlink() or not path.is_dir():
        return
    jobs = path / "jobs"
    for inside in (path, *([] if jobs.is_symlink() else [jobs])):
        yield from sorted(inside.glob(".*"))
    if (path / "submitit").exists():
        yield path / "submitit"


def _reason_to_remove(path: Path, root: Path) -> str | None:
    """Return why an entry can be removed, or None if it is needed; may raise `_Keep`."""
    if path.is_symlink():
        raise _Keep("a link, which slimbench does not write")
    kind = path.parent.name if path.parent.parent == root else "in a sweep"
    reasons = {
        "runs": _half_written_run, "locks": _free_lock, "tracked": _upload_note,
        "unfinished": _recorded_by_now, SWEEPS: _forgotten_sweep, "in a sweep": _part_of_sweep,
    }  # fmt: skip
    reason = reasons[kind](path, Store(root))
    if reason is not None and _age(path) < MIN_AGE_SECONDS:
        if kind == "locks":
            return None  # Every run leaves one.
        raise _Keep("younger than an hour: a process may be using it")
    return reason


def _half_written_run(path: Path, store: Store) -> str | None:
    """Return why a hidden entry among the records is left over; None for a record itself.

    A record is written to `.RUN.*` and renamed; a former one is first moved into `.old-RUN.*`.
    """
    if _PROBE.fullmatch(path.name) and _is_regular(path):
        return "probe of a process that ended"
    found = _HALF_WRITTEN_RUN.fullmatch(path.name)
    if found is None:
        if path.name.startswith("."):
            raise _Keep("not written by slimbench")
        return None
    run = found["run"]
    if _is_locked(store.root / "locks" / f"{run}.lock"):
        raise _Keep(f"a process is working on run {run}")
    if found["old"] and not store.folder(run).exists():
        raise _Keep(f"the only copy of run {run}: repeat its command, which puts it back")
    replaced = path / run if found["old"] else None
    for entry in foreign_entries(path, () if replaced else RECORD_FILES):
        if entry != replaced:
            raise _holds_foreign(entry)
    if replaced is not None and replaced.is_dir():
        for entry in foreign_entries(replaced, RECORD_FILES):
            raise _holds_foreign(entry)
    return "left over from a process that ended while writing"


def _free_lock(path: Path, store: Store) -> str | None:
    if not re.fullmatch(rf"{_RUN}\.lock", path.name) or not _is_regular(path):
        raise _Keep("not written by slimbench")
    # The file remains when its process ends, so only taking the lock shows that it is free.
    return None if _is_locked(path) else "unused lock"


def _upload_note(path: Path, store: Store) -> str | None:
    if not re.fullmatch(rf"{_RUN}\.json", path.name) or not _is_regular(path):
        raise _Keep("not written by slimbench")
    if store.folder(path.stem).exists():
        return None
    return f"upload note of run {path.stem}, which is gone"


def _recorded_by_now(path: Path, store: Store) -> str | None:
    if not re.fullmatch(_RUN, path.name) or not path.is_dir():
        raise _Keep("not written by slimbench")
    record = store.folder(path.name) / RECORD
    if store.find(path.name) is None:
        return None
    if _is_locked(store.root / "locks" / f"{path.name}.lock"):
        raise _Keep(f"a process is working on run {path.name}")
    # Newer state belongs to a run that will replace the record, and that resumes from it.
    if _newest(path) > record.lstat().st_mtime_ns:
        raise _Keep(f"newer than the record of run {path.name}, which it may replace")
    return f"run {path.name} is recorded"


def _forgotten_sweep(folder: Path, store: Store) -> str | None:
    if not _SWEEP.fullmatch(folder.name) or not folder.is_dir():
        raise _Keep("not written by slimbench")
    try:
        plan = load_plan(folder.absolute())
    except FileNotFoundError:
        raise _Keep("this sweep has no plan") from None
    except (OSError, ValueError) as error:
        raise _Keep(f"this version cannot read the sweep: {reason_of(error)}") from None
    jobs = sweep_jobs(plan)
    # A job without a status may be in a queue for days. A failed job has no record, but its note
    # and log still explain the failure.
    if not jobs or any(job.state != "waiting" or not job.recorded_before for job in jobs):
        return None
    for path in (*folder.iterdir(), *(folder / "jobs").iterdir()):
        known = _JOB_FILES if path.parent != folder else _SWEEP_FILES
        if not known.fullmatch(path.name) and not _HALF_WRITTEN_FILE.fullmatch(path.name):
            raise _holds_foreign(path)
    _refuse_foreign_queue_files(folder / "submitit")
    return "sweep whose records were all removed"


def _part_of_sweep(path: Path, store: Store) -> str | None:
    folder = path.parent.parent if path.parent.name == "jobs" else path.parent
    if path.name.startswith("."):
        if _HALF_WRITTEN_FILE.fullmatch(path.name) and _is_regular(path):
            return "left over from a process that ended while writing"
        raise _Keep("not written by slimbench")
    try:
        jobs = sweep_jobs(load_plan(folder.absolute()))
    except (OSError, ValueError):
        return None
    done = bool(jobs) and all(job.state == "done" for job in jobs)
    if done:
        _refuse_foreign_queue_files(path)
    return "queue submissions of a finished sweep" if done else None


def _refuse_foreign_queue_files(folder: Path) -> None:
    """Raise `_Keep` if a folder of queue submissions has files that the queue did not write."""
    for place, _, files in os.walk(folder, followlinks=False):
        for name in files:
            if not _QUEUE_FILES.fullmatch(name):
                raise _holds_foreign(Path(place, name))


def _holds_foreign(entry: Path) -> _Keep:
    return _Keep(f"contains {entry.name}, which slimbench did not write: move it away first")


def _is_locked(path: Path) -> bool:
    """Return whether a process holds a lock; true if in doubt."""
    if not path.exists():
        return False
    try:
        with FileLock(path, blocking=False):
            return False
    except (Timeout, OSError):
        return True


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _inside(path: Path) -> list[os.stat_result]:
    """Return the states of an entry and of everything in it; links are not followed."""
    states = [path.lstat()]
    if stat.S_ISDIR(states[0].st_mode):
        for folder, _, files in os.walk(path, followlinks=False):
            states += [Path(folder, name).lstat() for name in files]
            states.append(Path(folder).lstat())
    return states


def _newest(path: Path) -> int:
    return max(state.st_mtime_ns for state in _inside(path))


def _age(path: Path) -> float:
    return time.time() - _newest(path) / 1e9


def _measured(path: Path, relative: str, reason: str) -> Entry:
    states = _inside(path)
    files = [state.st_size for state in states if not stat.S_ISDIR(state.st_mode)]
    newest = max(state.st_mtime_ns for state in states)
    own = states[0]
    stamp = (own.st_dev, own.st_ino, own.st_mode, newest, len(states))
    return Entry(relative, reason, sum(files), stamp)


def remove(results_dir: Path, listed: tuple[Entry, ...]) -> Iterator[tuple[Entry, str | None]]:
    """Delete the listed entries; yield each one, with the reason if it was not deleted."""
    # Checked again, because a process may have started to use an entry since it was listed.
    now = {entry.path: entry for entry in find_unreferenced(results_dir).removable}
    for entry in listed:
        if now.get(entry.path) != entry:
            yield entry, "it changed after it was listed"
            continue
        try:
            _delete(results_dir, entry)
        except (OSError, _Keep) as error:
            yield entry, reason_of(error)
        else:
            yield entry, None


def _delete(root: Path, entry: Entry) -> None:
    """Delete an entry, opening all folders above it without following links."""
    *folders, name = Path(entry.path).parts
    with _opened(root, folders) as parent:
        state = os.lstat(name, dir_fd=parent)
        if (state.st_dev, state.st_ino, state.st_mode) != entry.stamp[:3]:
            raise _Keep("it changed after it was listed")
        if stat.S_ISDIR(state.st_mode):
            shutil.rmtree(name, dir_fd=parent)
        elif entry.path.endswith(".lock"):
            # Deleted while the lock is held: a process that has opened the file before sees that
            # it is unlinked, and opens a new one.
            with FileLock(root / entry.path, blocking=False):
                os.unlink(name, dir_fd=parent)
        else:
            os.unlink(name, dir_fd=parent)


@contextmanager
def _opened(root: Path, folders: list[str]) -> Iterator[int]:
    """Open a folder below `root`, without following links on the way."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    handle = os.open(root, flags)
    try:
        for folder in folders:
            inner = os.open(folder, flags | os.O_NOFOLLOW, dir_fd=handle)
            os.close(handle)
            handle = inner
        yield handle
    finally:
        os.close(handle)


def run_command(given: argparse.Namespace) -> int:
    """`bench gc`: list unreferenced files, and remove them once confirmed."""
    found = find_unreferenced(given.results_dir)
    rows = [
        {"path": str(given.results_dir / entry.path), "bytes": entry.bytes, "reason": entry.reason}
        for entry in found.removable
    ]
    print_rows(rows, as_json=given.json)
    for entry in found.kept:
        note(f"kept {given.results_dir / entry.path}: {entry.reason}")
    # With --json the output is for a program, which cannot answer a question.
    if not rows or (given.json and not given.yes):
        return EXIT_DONE
    # Without a terminal nobody can confirm, so nothing is removed.
    if not given.yes and not (sys.stdin.isatty() and _confirmed(len(rows))):
        note("nothing was deleted; `bench gc --yes` deletes them")
        return EXIT_DONE
    removed = 0
    for entry, fault in remove(given.results_dir, found.removable):
        if fault is None:
            removed += 1
        else:
            warn(f"kept {given.results_dir / entry.path}: {fault}")
    note(f"deleted {removed}")
    return EXIT_DONE


def _confirmed(count: int) -> bool:
    return input(f"Delete these {count}? [y/N] ").lower() == "y"
