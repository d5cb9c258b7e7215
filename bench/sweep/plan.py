"""Plan of a sweep, written before its first job starts and read to resume it.

It is stored as `results/sweeps/NAME/plan.json`; NAME is the start time, and the group that the
records of the sweep share.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from bench.errors import UserError, nearest
from bench.records.atomic import write_bytes
from bench.secrets import hide
from bench.sweep.inputs import Inputs

SWEEPS, PLAN = "sweeps", "plan.json"
SCHEMA = 1


@dataclass(frozen=True)
class Plan:
    """One sweep: its arguments (`asked`), working folder (`where`), and jobs in order.

    A job is the overrides of one run; its index in `jobs` is its number. `inputs` is None if
    something may change without a trace on this machine, such as a branch on the hub. A plan is
    `complete` once all jobs are known; a search adds them as it proceeds.
    """

    folder: Path
    asked: tuple[str, ...]
    where: str
    started: str
    inputs: Inputs | None = None
    jobs: tuple[tuple[str, ...], ...] = ()
    complete: bool = False

    @property
    def name(self) -> str:
        """Name of the sweep, stored as `group` in its records."""
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

    def with_jobs(self, jobs: Iterable[Sequence[str]], *, complete: bool) -> Plan:
        """Add the jobs that are not planned yet, write the plan, and return it."""
        # Read again under the lock: two commands may extend one sweep. The dict drops duplicates
        # and keeps the order, so that jobs keep their numbers.
        with FileLock(self.folder / f"{PLAN}.lock"):
            known = read(self.folder) or self
            together = dict.fromkeys([*known.jobs, *map(tuple, jobs)])
            grown = replace(self, jobs=tuple(together), complete=complete)
            grown.write()
        return grown

    def write(self) -> None:
        """Write the plan atomically."""
        # The folder is where the plan lies; without it a results folder can be moved.
        text = json.dumps({"schema_version": SCHEMA, **asdict(self), "folder": None}, indent=1)
        write_bytes(self.folder / PLAN, (hide(text) + "\n").encode())


def begin(results_dir: Path, asked: Sequence[str], inputs: Inputs | None) -> Plan:
    """Create a new sweep, named by the current time, and write its plan."""
    now = datetime.now(UTC)
    folder = (results_dir / SWEEPS / now.strftime("%Y%m%d-%H%M%S-%f")).absolute()
    plan = Plan(
        folder, tuple(asked), str(Path.cwd()), now.isoformat(timespec="milliseconds"), inputs
    )
    plan.write()
    return plan


def again(results_dir: Path, asked: Sequence[str]) -> Plan | None:
    """Return the latest sweep with the same arguments and working folder, if nothing has changed.

    Jobs of it that are done need not even be composed again.
    """
    # Only the latest one counts: if its inputs have changed, an older sweep is outdated as well.
    for plan in reversed(every(results_dir)):
        if plan.asked == tuple(asked) and plan.where == str(Path.cwd()):
            return plan if plan.inputs and plan.inputs.stand() else None
    return None


def every(results_dir: Path) -> list[Plan]:
    """Return all sweeps of a results folder, oldest first; unreadable plans are left out."""
    folders = sorted((results_dir / SWEEPS).glob("*"))
    return [plan for folder in folders if (plan := read(folder.absolute()))]


def find(results_dir: Path, name: str) -> Plan:
    """Return the sweep whose name starts with `name`; `latest` is the most recent one.

    Raises:
        UserError: no sweep matches, or several do.
    """
    plans = every(results_dir)
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


def read(folder: Path) -> Plan | None:
    """Read the plan in a folder; return None if it is missing, damaged or of another schema."""
    try:
        said = json.loads((folder / PLAN).read_text())
        if said.pop("schema_version") != SCHEMA:
            return None
        said["folder"] = folder
        said["asked"] = tuple(said["asked"])
        said["jobs"] = tuple(tuple(job) for job in said["jobs"])
        said["inputs"] = Inputs(**said["inputs"]) if said["inputs"] else None
        return Plan(**said)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
