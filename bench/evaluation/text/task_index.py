"""lm-eval's tasks, groups and tags by name, without an index of all of them.

lm-eval parses 14,000 files before it finds a name. Here the files of one folder after another are
searched for lines with names, and only files with the requested name are parsed, by lm-eval's own
code. lm-eval also assembles groups, from tasks that are not built yet.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml
from yaml import (  # type: ignore[import-untyped]
    MappingNode,
    Node,
    SafeLoader,
    YAMLError,
    compose,
)

from bench.errors import UserError, nearest
from bench.evaluation.row_files import existing_path
from bench.evaluation.task_planning import TaskDefinition, TaskFiles, included_files

FILES = TaskFiles("lm_eval", "lm-eval", ours=Path(__file__).parent / "tasks" / "micro")
NOT_INDEXED = frozenset({"__pycache__", ".ipynb_checkpoints"})
"""Folders that lm-eval ignores."""
_TOP_KEY = re.compile(
    rb"""^["']?(task|group|tag|include)["']?[ \t]*:[ \t]*([^\r\n]*)"""  # a key of the file itself
    rb"""|^[ \t]*-[ \t]*["']?([^\s"'#:]+)["']?[ \t]*(?:#[^\r\n]*)?\r?$""",  # an element of a list
    re.MULTILINE,
)
_MERGE_TAG = "tag:yaml.org,2002:merge"
"""Tag of the key `<<`, which may be repeated."""
_WORD = re.compile(rb"[^\s\[\]\"',#]+")


@dataclass(frozen=True)
class FilesByName:
    """The task files of one folder, by the names in them.

    `defining` are those with a task or group of this name, `tagged` those that may have the tag.
    """

    defining: Mapping[str, tuple[Path, ...]]
    tagged: Mapping[str, tuple[Path, ...]]


class NameIndex(dict[str, Entry]):
    """lm-eval's index, filled with a name when it is requested.

    It contains the tasks of a user's own folders from the start.
    """

    def __init__(self, own: Mapping[str, Entry], folder: Path | None = None) -> None:
        super().__init__(own)
        self.own = frozenset(own)
        self._folder = folder or FILES.harness_folder

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.find(name) is not None

    def __missing__(self, name: str) -> Entry:
        entry = self.find(name)
        if entry is None:
            raise KeyError(name)
        return entry

    def find(self, name: str) -> Entry | None:
        """Return the entry of a task, a group or a tag, None if this name does not exist."""
        found = super().get(name)
        if found is None:
            found = self._defined(name) or self._tag(name)
            if found is not None:
                self[name] = found
        return found

    def _defined(self, name: str) -> Entry | None:
        for file in self._defining_files(name):
            # As in lm-eval, the first file of a folder with the name is used.
            entry = _entries_of(file).get(name)
            if entry is not None and entry.kind is not Kind.TAG:
                return entry
        return None

    def _defining_files(self, name: str) -> Iterator[Path]:
        included = FILES.find_included(name)
        if included is not None:
            yield included
        for folder in self._folders(name):
            yield from _named_files(folder).defining.get(name, ())

    def _tag(self, name: str) -> Entry | None:
        tag = Entry(name, Kind.TAG, None, tags=set())
        for folder in self._folders(name):
            for file in _named_files(folder).tagged.get(name, ()):
                found = _entries_of(file).get(name)
                tag.tags |= found.tags if found is not None and found.kind is Kind.TAG else set()
        return tag if tag.tags else None

    def _folders(self, name: str) -> list[Path]:
        """Return the folders of tasks, those with names similar to the requested one first."""
        return sorted(_task_folders(self._folder), key=lambda folder: -_likeness(folder.name, name))

    def names(self) -> set[str]:
        """Return all names, to suggest the nearest one."""
        found = set(self)
        for folder in _task_folders(self._folder):
            found |= _named_files(folder).defining.keys()
        return found


def _likeness(folder: str, name: str) -> int:
    """Return the number of characters at the start that a folder and a task have in common."""
    same = 0
    for one, other in zip(folder.lower(), name.lower(), strict=False):
        if one != other:
            break
        same += 1
    return same


@cache
def _task_folders(root: Path) -> tuple[Path, ...]:
    """Return the folders of tasks, followed by the root itself for files in it."""
    inner = [each for each in root.iterdir() if each.is_dir() and each.name not in NOT_INDEXED]
    return (*sorted(inner), root)


@cache
def _named_files(folder: Path) -> FilesByName:
    is_root = folder == FILES.harness_folder
    files = folder.glob("*.yaml") if is_root else folder.rglob("*.yaml")
    defining: dict[str, list[Path]] = defaultdict(list)
    tagged: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(files, key=Path.as_posix):
        if NOT_INDEXED.isdisjoint(file.parts):
            names, tags = _names_in(file)
            for name in names:
                defining[name].append(file)
            for tag in tags:
                tagged[tag].append(file)
    return FilesByName(_frozen(defining), _frozen(tagged))


def _frozen(files: Mapping[str, list[Path]]) -> dict[str, tuple[Path, ...]]:
    return {name: tuple(found) for name, found in files.items()}


@cache
def _names_in(file: Path) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names that a file and its includes may define, and the names of its tags.

    Names are found line by line, because parsing a file takes ten times as long. An extra name only
    costs a parse, while a task whose name is missed could not be found.
    """
    names: set[str] = set()
    tags: set[str] = set()
    try:
        content = file.read_bytes()
    except OSError:  # A missing include: lm-eval reports it when the file is used.
        return frozenset(), frozenset()
    for key, value, element in _TOP_KEY.findall(content):
        words = {word.decode(errors="replace") for word in _WORD.findall(value)}
        if key == b"include":
            for word in words:
                inner = _names_in(file.parent / word)
                names |= inner[0]
                tags |= inner[1]
        elif key == b"tag":
            tags |= words
        elif key:
            names |= words
        else:
            tags.add(element.decode(errors="replace"))
    return frozenset(names), frozenset(tags)


@cache
def _entries_of(file: Path) -> dict[str, Entry]:
    """Return lm-eval's entries for one file."""
    entries: dict[str, Entry] = {}
    try:
        config = load_yaml(file, resolve_func=False)
        TaskIndex.process_cfg(config, file, entries)
    # lm-eval also ignores files that it cannot read.
    except Exception:
        return {}
    return entries


def index_of(include: tuple[str, ...]) -> NameIndex:
    """Return the index with the tasks of a user's own folders.

    Raises:
        UserError: a folder does not exist, has no task file, has two with the same task, or one
            that cannot be read or has a key twice.
    """
    folders = []
    for given in include:
        key = f"benchmark.include={given}"
        folder = existing_path(given, key)
        if folder.is_file():
            raise UserError(f"{key} is a file: give the folder in which it lies")
        files = sorted(folder.rglob("*.yaml"))
        if not files:
            raise UserError(f"{key}: no task file NAME.yaml is in this folder")
        named: dict[str, Path] = {}
        for file in files:
            name = _readable(file, key).get("task")
            # lm-eval would use one of them, without a word.
            if isinstance(name, str) and named.setdefault(name, file) != file:
                raise UserError(
                    f"{key}: {named[name].name} and {file.name} both define the task {name!r}: "
                    "rename one of them"
                )
        folders.append(folder.resolve())
    return NameIndex(TaskIndex.build(folders))


def _readable(file: Path, key: str) -> TaskDefinition:
    """Return the content of a task file; raise for one that lm-eval would silently ignore."""
    try:
        content: TaskDefinition = load_yaml(file, resolve_func=False)
    except (OSError, ValueError, YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{key}: {file.name} cannot be read as a task file: {reason}") from error
    # An included file may have another suffix, so only the file that includes it leads to it.
    for each in included_files(file):
        if not each.is_relative_to(FILES.harness_folder.resolve()):
            _refuse_repeated_keys(each, key)
    return content


def _refuse_repeated_keys(file: Path, key: str) -> None:
    """Raise if a mapping of the file has a key twice: the last value would silently count."""
    waiting: list[Node] = [compose(file.read_text(encoding="utf-8"), Loader=SafeLoader)]
    seen: set[int] = set()  # An alias leads to a node again, even to one that contains it.
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(node.value, list):
            continue
        seen.add(id(node))
        if not isinstance(node, MappingNode):
            waiting += node.value
            continue
        lines: dict[tuple[str, str], int] = {}
        for name, value in node.value:
            waiting.append(value)
            if not isinstance(name.value, str) or name.tag == _MERGE_TAG:
                continue
            line = name.start_mark.line + 1
            first = lines.setdefault((name.tag, name.value), line)
            if first != line:
                raise UserError(
                    f"{key}: {file.name} sets {name.value!r} in line {first} and again in line "
                    f"{line}: keep one of them"
                )


@dataclass(frozen=True)
class Leaf:
    """A task that is not built yet: its entry, and the settings from its group or tag."""

    entry: Entry
    overrides: TaskDefinition

    @property
    def task_name(self) -> str:
        """The name under which the harness reports the task."""
        return str(self.overrides.get("task") or self.entry.name)


class _OutlineFactory(TaskFactory):  # type: ignore[misc]  # the harness has no types
    """lm-eval's factory of groups, with leaves instead of tasks, whose data would be loaded."""

    def _build_task(self, entry: Entry, overrides: TaskDefinition | None) -> Leaf:
        return Leaf(entry, dict(overrides or {}))

    def _build_group_members(
        self,
        member_list: list[Any],
        group_name: str,
        overrides: TaskDefinition,
        registry: NameIndex,
    ) -> list[Any]:
        members = []
        for member in member_list:
            name = member if isinstance(member, str) else member.get("task")
            if isinstance(name, str) and "group" not in (member or ()) and name not in registry:
                if isinstance(member, str):
                    raise UserError(f"group {group_name!r} has a task {name!r}, which is unknown")
                # lm-eval would immediately build a task that is defined inside its group.
                inner = f"{group_name}::{name}"
                registry[inner] = Entry(inner, Kind.TASK, None, cfg={})
                member = {**member, "task": inner}  # noqa: PLW2901
            members.append(member)
        built: list[Any] = super()._build_group_members(members, group_name, overrides, registry)
        return built


@dataclass(frozen=True)
class Outline:
    """The content of a name: its leaves in order, and its groups by name, outermost first."""

    name: str
    leaves: tuple[Leaf, ...]
    groups: dict[str, Group]

    def chain(self, leaf: str) -> list[str]:
        """Return a leaf's name and those of the groups around it, innermost first."""
        around = [name for name, group in self.groups.items() if leaf in dict(_leaves(group))]
        return [leaf, *reversed(around)]


def outlines(name: str, index: NameIndex) -> list[Outline]:
    """Return the content of a name: a task, a group with its tasks, or each task of a tag.

    Raises:
        UserError: no task, group or tag has this name, or a group contains itself.
    """
    entry = index.find(name)
    if entry is None:
        raise unknown_task(name, index)
    try:
        built = _OutlineFactory().build(entry, registry=index)
    except RecursionError:
        raise UserError(
            f"the group {name!r} contains itself, directly or through its groups: list only tasks "
            "and other groups in it"
        ) from None
    if isinstance(built, list):
        return [Outline(leaf.task_name, (leaf,), {}) for leaf in built]
    if isinstance(built, Leaf):
        return [Outline(built.task_name, (built,), {})]
    groups = {built.name: built, **{group.name: group for group in built.get_all_groups()}}
    return [Outline(name, tuple(dict(_leaves(built)).values()), groups)]


def _leaves(group: Group) -> Iterator[tuple[str, Leaf]]:
    for child in group:
        if isinstance(child, Group):
            yield from _leaves(child)
        else:
            yield child.task_name, child


def unknown_task(name: str, index: NameIndex) -> UserError:
    """Build the error for a task that does not exist, suggesting the nearest name."""
    close = nearest(name, sorted(index.names()))
    hint = f"did you mean {close!r}?" if close else "`lm-eval ls tasks` lists them"
    return UserError(f"unknown task {name!r} in benchmark.tasks: {hint}")
