"""lmms-eval's task files, found by name without indexing all of them."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

from bench.errors import UserError, nearest, unknown

MICRO = Path(__file__).parent / "tasks" / "micro"
"""Our task files; each includes one of the harness's and replaces the source of its data."""

_TASK = re.compile(r"^task[ \t]*:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*\r?$", re.MULTILINE)
_GROUP = re.compile(r"^group[ \t]*:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*\r?$", re.MULTILINE)


def micro_names() -> tuple[str, ...]:
    """Return the names of the tasks with embedded data."""
    return tuple(sorted(file.stem for file in MICRO.glob("*.yaml")))


@cache
def harness_folder() -> Path:
    """Return the folder of lmms-eval's task files, wherever it is installed."""
    # Finding a spec does not import lmms-eval, which takes seconds.
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or spec.origin is None:
        raise UserError("lmms-eval is not installed: `pip install lmms-eval`")
    return Path(spec.origin).parent / "tasks"


def find_micro(name: str) -> Path:
    """Return our task file for `name`.

    Raises:
        UserError: the task has no embedded data.
    """
    if name not in micro_names():
        raise unknown("task of benchmark.suite=micro", name, micro_names())
    return MICRO / f"{name}.yaml"


@cache
def find(name: str) -> Path:
    """Return the harness's task file for `name`.

    Raises:
        UserError: no task has this name, or it is a group.
    """
    ours = MICRO / f"{name}.yaml"
    if ours.is_file():
        return harness_folder() / included(ours)
    return _search(name)


def included(file: Path) -> str:
    """Return the path that one of our task files includes, relative to the harness's folder."""
    (line,) = re.findall(r"^include: *(\S+)", file.read_text(), re.MULTILINE)
    return str(line)


def _search(name: str) -> Path:
    names: set[str] = set()
    for file in sorted(harness_folder().rglob("*.yaml")):
        content = file.read_text(encoding="utf-8", errors="replace")
        found = _TASK.findall(content)
        if name in found:
            return file
        if name in _GROUP.findall(content):
            raise UserError(
                f"benchmark.tasks: {name} is a group of lmms-eval; list its tasks instead"
            )
        names.update(found)
    close = nearest(name, sorted(names))
    hint = f"did you mean {close!r}?" if close else "`lmms-eval --tasks list` lists them"
    raise UserError(f"unknown task {name!r} in benchmark.tasks: {hint}")
