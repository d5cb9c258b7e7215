"""Groups and tags of tasks, resolved by lm-eval's full index, which takes seconds to build."""

from __future__ import annotations

from functools import cache
from typing import Any

from lm_eval.tasks import TaskManager

from bench.evaluation.text import catalog


@cache
def _manager() -> TaskManager:
    return TaskManager()


def expand(name: str) -> list[str]:
    """Return the tasks that carry a tag; a task or a group is returned as it is."""
    # Checked first, so that a benchmark of plain tasks never builds the index.
    if catalog.find(name) is not None:
        return [name]
    manager = _manager()
    if name not in manager.task_index:
        raise catalog.unknown_task(name, manager.all_tasks)
    return sorted(manager.task_index[name].tags) if name in manager.all_tags else [name]


def load(name: str) -> dict[str, Any]:
    """Let the harness build a group with all its members."""
    loaded: dict[str, Any] = _manager().load([name])
    return loaded


def data_sets(name: str) -> list[str]:
    """Return the hub data sets that the members of a group read."""
    return sorted(_data_sets(name))


def _data_sets(name: str) -> set[str]:
    entry = _manager().task_index.get(name)
    if entry is None:
        return set()
    config: dict[str, Any] = entry.cfg or {}
    members = config.get("task", [])
    if isinstance(members, str):
        return {str(config.get("dataset_path", name))}
    named = [m if isinstance(m, str) else str(m.get("task") or m.get("group")) for m in members]
    return set().union(*(_data_sets(member) for member in [*named, *sorted(entry.tags)]))
