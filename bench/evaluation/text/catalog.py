"""lm-eval's task files, found by name without building its index of about 14,000 tasks."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

from bench.errors import UserError, nearest, unknown

MICRO = Path(__file__).parent / "tasks" / "micro"
"""Our task files; each includes one of the harness's and replaces the source of its data."""


def micro_names() -> tuple[str, ...]:
    """Return the names of the tasks with embedded data."""
    return tuple(sorted(file.stem for file in MICRO.glob("*.yaml")))


@cache
def harness_folder() -> Path:
    """Return the folder of lm-eval's task files, wherever it is installed."""
    # Finding a spec does not import lm-eval, which takes seconds.
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise UserError("lm-eval is not installed: `pip install lm-eval`")
    return Path(spec.origin).parent / "tasks"


@cache
def find(name: str) -> Path | None:
    """Return the file of a task, or None for a group or a tag.

    Raises:
        UserError: no task, group or tag has this name.
    """
    return _known_file(name) or _search(name)


def find_micro(name: str) -> Path:
    """Return our task file for `name`.

    Raises:
        UserError: the task has no embedded data.
    """
    if name not in micro_names():
        raise unknown("task of benchmark.suite=micro", name, micro_names())
    return MICRO / f"{name}.yaml"


def _known_file(name: str) -> Path | None:
    """Find a task through our own file for it, which includes the harness's: no search needed."""
    ours = MICRO / f"{name}.yaml"
    if not ours.is_file():
        return None
    file = harness_folder() / included(ours)
    return file if file.is_file() else None


def included(file: Path) -> str:
    """Return the path that one of our task files includes, relative to the harness's folder."""
    # Read by a pattern: the files contain `!function` tags, which a plain YAML loader rejects.
    (line,) = re.findall(r"^include: *(\S+)", file.read_text(), re.MULTILINE)
    return str(line)


def _search(name: str) -> Path | None:
    """Search all task files for a name."""
    # Scanning bytes for a pattern takes half a second, the harness's index five: it parses every
    # file as YAML. A file with both `task:` and `group:` of this name defines a group.
    task, mention, group = _line(["task"], name), _line(["group", "tag"], name), _line(["group"])
    member = re.compile(rb"^[ \t]*-[ \t]*[\"']?" + re.escape(name).encode() + rb"\b", re.MULTILINE)
    any_name = _line(["task", "group"])
    named: set[bytes] = set()
    is_several = False
    for file in sorted(harness_folder().rglob("*.yaml")):
        content = file.read_bytes()
        if task.search(content) and not group.search(content):
            return file
        # A name that only ever occurs as a group, a tag or a member of one has no file of its own;
        # the harness's index must resolve it.
        is_several = is_several or bool(mention.search(content) or member.search(content))
        named.update(any_name.findall(content))
    if is_several:
        return None
    raise unknown_task(name, [found.decode() for found in named])


def _line(keys: list[str], name: str | None = None) -> re.Pattern[bytes]:
    """Match a line of YAML that gives one of the keys this value, or any value."""
    value = r"([\w.+-]+)" if name is None else re.escape(name)
    key = "|".join(keys)
    line = rf"^[\"']?(?:{key})[\"']?[ \t]*:[ \t]*[\"']?{value}[\"']?[ \t]*\r?$"
    return re.compile(line.encode(), re.MULTILINE)


def unknown_task(name: str, names: list[str]) -> UserError:
    """Build the error for a task that does not exist, with the nearest name as a hint."""
    close = nearest(name, names)
    hint = f"did you mean {close!r}?" if close else "`lm-eval ls tasks` lists them"
    return UserError(f"unknown task {name!r} in benchmark.tasks: {hint}")
