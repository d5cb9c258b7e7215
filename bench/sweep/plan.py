"""What a sweep was asked to run: written before its first job, read by whoever goes on with it.

`results/sweeps/NAME/plan.json`; NAME is the time of the beginning and the group that the sweep's
records share.
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
    """One sweep: the arguments as they were given, where, and its jobs in order.

    A job is the overrides of one run; its place in `jobs` is its number. `inputs` is None when
    something may change without a trace on this machine, as a branch on the hub does.
    A plan is `complete` once all its jobs are known; a search makes them up as it goes.
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
        """The sweep's name, which its records share as their group."""
        return self.folder.name

    @property
    def results_dir(self) -> Path:
        """The results folder that the sweep is part of."""
        return self.folder.parent.parent

    def number(self, overrides: Sequence[str]) -> int | None:
        """Return a job's number, or None for one that some other sweeper made up."""
        try:
            return self.jobs.index(tuple(overrides))
        except ValueError:
            return None

    def with_jobs(self, jobs: Iterable[Sequence[str]], *, complete: bool) -> Plan:
        """Add the jobs that are not there yet, write the plan, and return it."""
        with FileLock(self.folder / f"{PLAN}.lock"):
            known = read(self.folder) or self
            together = dict.fromkeys([*known.jobs, *map(tuple, jobs)])
            grown = replace(self, jobs=tuple(together), complete=complete)
            grown.write()
        return grown

    def write(self) -> None:
        """Write the plan, whole or not at all."""
        text = json.dumps({"schema_version": SCHEMA, **asdict(self), "folder": None}, indent=1)
        write_bytes(self.folder / PLAN, (hide(text) + "\n").encode())


def begin(results_dir: Path, asked: Sequence[str], inputs: Inputs | None) -> Plan:
    """Name a new sweep by the time and write down what it is."""
    now = datetime.now(UTC)
    folder = (results_dir / SWEEPS / now.strftime("%Y%m%d-%H%M%S-%f")).absolute()
    plan = Plan(
        folder, tuple(asked), str(Path.cwd()), now.isoformat(timespec="milliseconds"), inputs
    )
    plan.write()
    return plan


def again(results_dir: Path, asked: Sequence[str]) -> Plan | None:
    """Return the latest sweep of the same arguments in the same place whose inputs still stand.

    Its jobs that are done need not even be composed again.
    """
    for plan in reversed(every(results_dir)):
        if plan.asked == tuple(asked) and plan.where == str(Path.cwd()):
            return plan if plan.inputs and plan.inputs.stand() else None
    return None


def every(results_dir: Path) -> list[Plan]:
    """Return all sweeps of a results folder, oldest first; what cannot be read is left out."""
    folders = sorted((results_dir / SWEEPS).glob("*"))
    return [plan for folder in folders if (plan := read(folder.absolute()))]


def find(results_dir: Path, name: str) -> Plan:
    """Return the sweep whose name begins so; `latest` is the one that began last.

    Raises:
        UserError: there is none, or more than one.
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
    """Read the plan in a folder; None where there is none that this version can read."""
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
