"""`bench gc`: unreferenced files in a results folder.

Records, samples and studies are never removed. Files younger than one hour are kept: a running job
may own them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from bench.errors import EXIT_DONE
from bench.records import Store
from bench.sweeps import sweep_jobs
from bench.sweeps.plan import SWEEPS, read_plan
from bench.ui import print_rows

MIN_AGE_SECONDS = 3600.0


@dataclass(frozen=True)
class UnreferencedFile:
    """A file or folder that can be removed, its size in bytes, and the reason."""

    path: Path
    bytes: int
    reason: str


def find_unreferenced(results_dir: Path) -> list[UnreferencedFile]:
    """Return unreferenced files, largest first."""
    found = [
        *_interrupted_writes(results_dir),
        *_free_locks(results_dir),
        *_orphaned_tracker_notes(results_dir),
    ]
    found += [*_empty_sweeps(results_dir), *_recorded_unfinished(results_dir)]
    old = [(path, reason) for path, reason in found if _age(path) > MIN_AGE_SECONDS]
    listed = [UnreferencedFile(path, _size(path), reason) for path, reason in old]
    return sorted(listed, key=lambda item: (-item.bytes, item.path))


def remove_unreferenced(items: list[UnreferencedFile]) -> None:
    """Delete what `find_unreferenced` returned; a link is deleted, never its target."""
    for item in items:
        if item.path.is_dir() and not item.path.is_symlink():
            shutil.rmtree(item.path)
        else:
            item.path.unlink(missing_ok=True)


def _interrupted_writes(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield temporary files of interrupted writes."""
    for folder in (root / "runs", *(root / SWEEPS).glob("*"), *(root / SWEEPS).glob("*/jobs")):
        # Atomic writes go to a hidden file next to the target and are renamed when complete.
        for path in folder.glob(".*"):
            yield path, "incomplete write of a process that ended"


def _free_locks(root: Path) -> Iterator[tuple[Path, str]]:
    for path in (root / "locks").glob("*.lock"):
        try:
            # The file stays after its process ends; only taking the lock shows that it is free.
            with FileLock(path, blocking=False):
                yield path, "unused lock"
        except (Timeout, OSError):
            continue


def _orphaned_tracker_notes(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield notes about uploads to a tracker whose record is gone."""
    known = set(Store(root).ids())
    for path in (root / "tracked").glob("*.json"):
        if path.stem not in known:
            yield path, f"upload note of run {path.stem}, which is gone"


def _recorded_unfinished(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the resume data of runs that are recorded by now."""
    known = set(Store(root).ids())
    for path in (root / "unfinished").glob("*"):
        if path.name in known:
            yield path, f"run {path.name} is recorded"


def _empty_sweeps(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield sweeps without any record, and queue submissions of finished sweeps."""
    known = set(Store(root).ids())
    for folder in (root / SWEEPS).glob("*"):
        plan = read_plan(folder.absolute())
        if plan is None:
            yield folder, "sweep without a readable plan"
            continue
        states = sweep_jobs(plan)
        if any(job.state == "running" for job in states):
            continue
        if not any(job.run in known for job in states):
            # A failed job has no record, but its note and log still explain the failure.
            if not any(job.state == "failed" for job in states):
                yield folder, "sweep without any remaining record"
        elif (folder / "submitit").is_dir() and all(job.state == "done" for job in states):
            yield folder / "submitit", "queue submissions of a finished sweep"


def _age(path: Path) -> float:
    """Return the seconds since anything inside was last modified."""
    files = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
    try:
        return time.time() - max(file.lstat().st_mtime for file in files)
    except OSError:
        return 0.0  # a file vanished while listing, so the folder is in use


def _size(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())


def run_command(given: argparse.Namespace) -> int:
    """`bench gc`: list unreferenced files, and remove them once confirmed."""
    found = find_unreferenced(given.results_dir)
    rows = [{"path": str(item.path), "bytes": item.bytes, "reason": item.reason} for item in found]
    print_rows(rows, given.json)
    # With --json the output is for a program, which cannot answer a question.
    if not found or (given.json and not given.yes):
        return EXIT_DONE
    # Without a terminal nobody can confirm, so nothing is removed.
    if given.yes or (sys.stdin.isatty() and input("Remove these? [y/N] ").lower() == "y"):
        remove_unreferenced(found)
        print(f"removed {len(found)}", file=sys.stderr)
    else:
        print("bench: nothing was removed; `bench gc --yes` removes them", file=sys.stderr)
    return EXIT_DONE
