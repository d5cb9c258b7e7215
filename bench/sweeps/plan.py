"""Plan of a sweep, written before its first job starts and read to resume it.

It is stored as `results/sweeps/NAME/plan.json`; NAME is the start time, and the name of the sweep
in its records.

The plan includes a fingerprint of everything that affects the results. The id of a run determines
whether it must be executed; the fingerprint only saves time, because it needs neither composing the
runs nor loading a model library, and counts as changed if in doubt. Files are represented by what
the file system states: inode, size and times.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from bench.data.digests import file_stamp
from bench.errors import UserError, nearest
from bench.records.files import folder_entries, read_json, warn_once, write_bytes
from bench.security import CONFIG_DIR, redact

MAX_FILES = 1_000_000
SWEEPS, PLAN = "sweeps", "plan.json"
PLAN_SCHEMA = 2


@dataclass(frozen=True)
class SweepFingerprint:
    """Files and packages that affect the results, and a hash of their state."""

    files: list[str]
    packages: list[str]
    state: str

    @classmethod
    def record_now(cls, files: Iterable[Path], packages: Iterable[str]) -> SweepFingerprint:
        """Record the current state of data and model files and of the packages with the code."""
        # Absolute, because the sweep may be resumed from another folder.
        named = sorted({str(file.absolute()) for file in files})
        code = sorted({"bench", *packages})
        return cls(named, code, _fingerprint(named, code))

    def is_current(self) -> bool:
        """Return whether nothing has changed since the state was recorded."""
        return _fingerprint(self.files, self.packages) == self.state


@dataclass(frozen=True)
class SweepPlan:
    """One sweep: its arguments, the folder where it was started, and its jobs in order.

    A job is the overrides of one run; its index in `jobs` is its number. `fingerprint` is None if
    something may change without a trace on this machine, such as a branch on the hub. A plan is
    `complete` once all jobs are known; a search adds them as it proceeds.
    """

    folder: Path
    arguments: tuple[str, ...]
    working_folder: str
    started: str
    fingerprint: SweepFingerprint | None = None
    jobs: tuple[tuple[str, ...], ...] = ()
    complete: bool = False

    @property
    def name(self) -> str:
        """Name of the sweep, stored as `sweep` in its records."""
        return self.folder.name

    @property
    def results_dir(self) -> Path:
        """Results folder that contains the sweep."""
        return self.folder.parent.parent

    def number(self, overrides: Sequence[str]) -> int | None:
        """Return the number of a job, or None if it is not planned (made by a foreign sweeper)."""
        try:
            return self.jobs.index(tuple(overrides))
        except ValueError:
            return None

    def with_jobs(self, jobs: Iterable[Sequence[str]], *, complete: bool) -> SweepPlan:
        """Add the jobs that are not planned yet, write the plan, and return it."""
        # Read again under the lock, because two commands may extend the same sweep. The dict drops
        # duplicates and keeps the order, so that jobs keep their numbers.
        with FileLock(self.folder / f"{PLAN}.lock"):
            known = read_plan(self.folder) or self
            together = dict.fromkeys([*known.jobs, *map(tuple, jobs)])
            grown = replace(self, jobs=tuple(together), complete=complete)
            grown.write()
        return grown

    def write(self) -> None:
        """Write the plan atomically."""
        # Without the path of the folder itself, so that a results folder can be moved.
        text = json.dumps({"schema_version": PLAN_SCHEMA, **asdict(self), "folder": None}, indent=1)
        write_bytes(self.folder / PLAN, (redact(text) + "\n").encode())


def create_plan(
    results_dir: Path, arguments: Sequence[str], fingerprint: SweepFingerprint | None
) -> SweepPlan:
    """Create a new sweep, named by the current time, and write its plan."""
    now = datetime.now(UTC)
    folders = (results_dir / SWEEPS).absolute()
    # If the clock was set back, or in the same microsecond, an older sweep may have the name.
    while (folder := folders / now.strftime("%Y%m%d-%H%M%S-%f")).exists():
        now += timedelta(microseconds=1)
    plan = SweepPlan(
        folder,
        tuple(arguments),
        str(Path.cwd()),
        now.isoformat(timespec="milliseconds"),
        fingerprint,
    )
    plan.write()
    return plan


def existing_sweep(results_dir: Path, arguments: Sequence[str]) -> SweepPlan | None:
    """Return the latest sweep with the same arguments and working folder, if nothing has changed.

    Its finished jobs need not even be composed again.
    """
    # Only the latest one: if its fingerprint has changed, older sweeps are outdated as well.
    for plan in reversed(all_sweeps(results_dir)):
        if plan.arguments == tuple(arguments) and plan.working_folder == str(Path.cwd()):
            return plan if plan.fingerprint and plan.fingerprint.is_current() else None
    return None


def all_sweeps(results_dir: Path) -> list[SweepPlan]:
    """Return all sweeps of a results folder, oldest first; warn about unreadable ones."""
    plans = []
    for folder in folder_entries(results_dir / SWEEPS):
        # The folder may contain others, for example those of a repository or a file system.
        if folder.name.startswith("."):
            continue
        try:
            plans.append(load_plan(folder.absolute()))
        except (OSError, ValueError) as error:
            warn_once(folder, error)
    return plans


def find_sweep(results_dir: Path, name: str) -> SweepPlan:
    """Return the sweep whose name starts with `name`; `latest` is the most recent one.

    Raises:
        UserError: no sweep matches, or several do.
    """
    # Every name starts with the empty string, which would match a single sweep.
    if not name:
        raise UserError(
            "the name of a sweep is empty, as an unset shell variable is: give its beginning, or "
            "latest"
        )
    plans = all_sweeps(results_dir)
    if name == "latest":
        matches = plans[-1:]
    else:
        matches = [plan for plan in plans if plan.name.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"sweep {name!r} is ambiguous: {', '.join(p.name for p in matches)}")
    close = nearest(name, [plan.name for plan in plans])
    hint = f"did you mean {close!r}?" if close else f"{len(plans)} sweeps in {results_dir / SWEEPS}"
    raise UserError(f"unknown sweep {name!r}: {hint}")


def read_plan(folder: Path) -> SweepPlan | None:
    """Read the plan in a folder; return None if it is missing, damaged or of another schema."""
    try:
        return load_plan(folder)
    except (OSError, ValueError):
        return None


def load_plan(folder: Path) -> SweepPlan:
    """Read the plan in a folder.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is damaged, of another schema, or reached through a link.
    """
    # Jobs are written below the folder, so a link would redirect them.
    for place in (folder, folder / "jobs"):
        if place.is_symlink():
            raise ValueError(f"{place.name} is a link")
    content = read_json(folder / PLAN)
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != PLAN_SCHEMA:
        raise ValueError(f"its plan is version {found}, this program reads {PLAN_SCHEMA}")
    try:
        stored = _StoredPlan.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(map(str, fault["loc"]))
        raise ValueError(f"its plan is damaged: {key}: {fault['msg'].lower()}") from None
    return SweepPlan(
        folder,
        stored.arguments,
        stored.working_folder,
        stored.started,
        stored.fingerprint,
        stored.jobs,
        stored.complete,
    )


class _StoredPlan(BaseModel):
    """The content of a plan's file."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int
    folder: None
    arguments: tuple[str, ...]
    working_folder: str
    started: str
    fingerprint: SweepFingerprint | None
    jobs: tuple[tuple[str, ...], ...]
    complete: bool


def plan_in(folder: Path) -> SweepPlan:
    """Return the plan in a folder, or an empty one: sweepers may run without `bench run`."""
    return read_plan(folder) or SweepPlan(folder, (), str(Path.cwd()), "")


PROGRAM_SUFFIXES = {".py", ".yaml", ".json", ".safetensors", ".jinja", ".gz", ".txt"}


def _fingerprint(files: list[str], packages: list[str]) -> str:
    # Includes the host, because modification times are comparable only within a machine.
    digest = hashlib.sha256(f"{platform.node()} {platform.python_version()}\n".encode())
    for line in (*_installed_libraries(), *_file_stamps(files, packages)):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _installed_libraries() -> Iterator[str]:
    """Yield the names and versions of all installed packages, as in `torch-2.9.0.dist-info`."""
    # All of them, because those that a method or task uses are known only after importing it.
    for entry in dict.fromkeys(sys.path):
        try:
            found = sorted(os.listdir(entry))  # noqa: PTH208 (no Path for 1,000 names)
        except OSError:  # A zip file, or a folder that has been removed.
            continue
        yield from (name for name in found if name.endswith((".dist-info", ".egg-info")))


def _file_stamps(files: list[str], packages: list[str]) -> Iterator[str]:
    """Yield path and state of every file, in a fixed order."""
    for name in files:
        path = Path(name)
        for file in sorted(_files_below(path)) if path.is_dir() else [path]:
            # Compiled files appear when a task's code is imported.
            if "__pycache__" not in file.parts:
                yield _file_stamp(file)
    roots = [CONFIG_DIR]
    for package in packages:
        # A dotted name would be imported up to its last dot, but a plan may contain any name.
        if not package.isidentifier():
            continue
        # `find_spec` locates a top-level package without importing it.
        found = importlib.util.find_spec(package)
        roots += map(Path, (found.submodule_search_locations or []) if found else [])
    for root in roots:
        for file in sorted(root.rglob("*")):
            if file.suffix in PROGRAM_SUFFIXES:
                yield _file_stamp(file)


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder of data; a folder with too many files counts as changed."""
    for count, file in enumerate(folder.rglob("*")):
        if count == MAX_FILES:
            yield folder / f"more than {MAX_FILES} at {time.time_ns()}"
            return
        yield file


def _file_stamp(file: Path) -> str:
    try:
        return str(file) if file.is_dir() else f"{file} {file_stamp(file)}"
    except OSError:
        return f"{file} missing"
