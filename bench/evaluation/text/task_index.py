"""lm-eval's task files, groups and definitions, found by name without its full index."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from bench.data.hub import unreachable_error
from bench.errors import UserError, nearest, unknown_name

MICRO_TASKS = Path(__file__).parent / "tasks" / "micro"
"""Our task files; each includes one of the harness's and replaces the source of its data."""


def micro_names() -> tuple[str, ...]:
    """Return the names of the tasks with embedded data."""
    return tuple(sorted(file.stem for file in MICRO_TASKS.glob("*.yaml")))


@cache
def harness_folder() -> Path:
    """Return the folder of lm-eval's task files, wherever it is installed."""
    # Finding a spec does not import lm-eval, which takes seconds.
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise UserError("lm-eval is not installed: `pip install lm-eval`")
    return Path(spec.origin).parent / "tasks"


@cache
def find_task_file(name: str) -> Path | None:
    """Return the file of a task, or None for a group or a tag.

    Raises:
        UserError: no task, group or tag has this name.
    """
    return _known_file(name) or _search_task_files(name)


def find_micro_task_file(name: str) -> Path:
    """Return our task file for `name`.

    Raises:
        UserError: the task has no embedded data.
    """
    if name not in micro_names():
        raise unknown_name("task of benchmark.suite=micro", name, micro_names())
    return MICRO_TASKS / f"{name}.yaml"


def _known_file(name: str) -> Path | None:
    """Find a task through our own file for it, which includes the harness's: no search needed."""
    ours = MICRO_TASKS / f"{name}.yaml"
    if not ours.is_file():
        return None
    file = harness_folder() / included_path(ours)
    return file if file.is_file() else None


def included_path(file: Path) -> str:
    """Return the path that one of our task files includes, relative to the harness's folder."""
    # Read by a pattern: the files contain `!function` tags, which a plain YAML loader rejects.
    (line,) = re.findall(r"^include: *(\S+)", file.read_text(), re.MULTILINE)
    return str(line)


def _search_task_files(name: str) -> Path | None:
    """Search all task files for a name."""
    # Scanning bytes for a pattern takes half a second, the harness's index five: it parses every
    # file as YAML. A file with both `task:` and `group:` of this name defines a group.
    task, mention, group = (
        _key_line_pattern(["task"], name),
        _key_line_pattern(["group", "tag"], name),
        _key_line_pattern(["group"]),
    )
    member = re.compile(rb"^[ \t]*-[ \t]*[\"']?" + re.escape(name).encode() + rb"\b", re.MULTILINE)
    any_name = _key_line_pattern(["task", "group"])
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


def _key_line_pattern(keys: list[str], name: str | None = None) -> re.Pattern[bytes]:
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


def read_task_definition(file: Path) -> dict[str, Any]:
    """Return a definition with its includes merged and its functions imported.

    Raises:
        UserError: the task executes generated code, or needs a package that is not installed.
        Unreachable: its functions load data from the hub on import.
    """
    if file.parent == MICRO_TASKS:
        return _read_micro_definition(file)
    # Checked before functions are resolved: resolving imports the task's Python modules.
    if load_yaml(file, resolve_func=False).get("unsafe_code"):
        raise UserError(f"{file.stem} executes generated code, which slimbench refuses")
    try:
        defined: dict[str, Any] = load_yaml(file)
    except ImportError as error:
        raise UserError(f"lm-eval's {file.name} needs a missing package: {error}") from error
    except OSError as error:
        raise unreachable_error(f"data loaded by {file.name}", error) from error
    return defined


def _read_micro_definition(file: Path) -> dict[str, Any]:
    """Read one of our files; its include is relative to the harness's folder."""
    # lm-eval resolves includes relative to the including file, and where lm-eval is installed is
    # known at run time only; so the include is taken out and merged here.
    ours: dict[str, Any] = load_yaml(file, recursive=False)
    theirs: dict[str, Any] = load_yaml(harness_folder() / ours.pop("include"))
    return {**theirs, **ours}


def num_shots(defined: dict[str, Any], wanted: int | None) -> int:
    """Return a task's number of shots by the harness's rule."""
    # A task that declares 0 shots stays at 0, as in lm-eval: its prompt is written for zero shots.
    own = defined.get("num_fewshot")
    return int(own or 0) if own == 0 or wanted is None else wanted


def evaluated_split(defined: dict[str, Any]) -> str:
    """Return the split that the harness scores: test if the task has one, else validation."""
    return str(defined.get("test_split") or defined.get("validation_split"))


def restrict_to_splits(defined: dict[str, Any], present: set[str]) -> dict[str, Any]:
    """Return the definition with only the splits in `present`.

    If nothing else is left to draw few-shot examples from, they come from the scored split. It is
    then declared as the test split, because only there does the harness exclude the scored document
    from its own examples.
    """
    scored = evaluated_split(defined)
    keys = ("training_split", "validation_split", "test_split", "fewshot_split")
    kept = {key: name if (name := defined.get(key)) in present else None for key in keys}
    examples = dict(defined.get("fewshot_config") or {})
    if examples.get("split") not in present:
        examples.pop("split", None)
    if not {*kept.values(), examples.get("split")} - {None, scored} and "samples" not in examples:
        kept = dict.fromkeys(keys) | {"test_split": scored, "fewshot_split": scored}
    return {**defined, **kept, "fewshot_config": examples or None}


@cache
def _task_manager() -> TaskManager:
    return TaskManager()


def expand_tag(name: str) -> list[str]:
    """Return the tasks that carry a tag; a task or a group is returned as it is."""
    # Checked first, so that a benchmark of plain tasks never builds the index.
    if find_task_file(name) is not None:
        return [name]
    manager = _task_manager()
    if name not in manager.task_index:
        raise unknown_task(name, manager.all_tasks)
    return sorted(manager.task_index[name].tags) if name in manager.all_tags else [name]


def load_task_group(name: str) -> dict[str, Any]:
    """Let the harness build a group with all its members."""
    loaded: dict[str, Any] = _task_manager().load([name])
    return loaded


def group_data_sets(name: str) -> list[str]:
    """Return the hub data sets that the members of a group read."""
    return sorted(_member_data_sets(name))


def _member_data_sets(name: str) -> set[str]:
    entry = _task_manager().task_index.get(name)
    if entry is None:
        return set()
    config: dict[str, Any] = entry.cfg or {}
    members = config.get("task", [])
    if isinstance(members, str):
        return {str(config.get("dataset_path", name))}
    named = [m if isinstance(m, str) else str(m.get("task") or m.get("group")) for m in members]
    return set().union(*(_member_data_sets(member) for member in [*named, *sorted(entry.tags)]))
