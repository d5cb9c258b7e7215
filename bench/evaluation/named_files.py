"""Files on this machine that a task file names itself, in place of a data set on the hub.

lm-eval hands `dataset_path: json` and `dataset_kwargs: {data_files: ...}` to `datasets`, which
takes relative names from the working folder and remembers files by path and time. Here they are
taken from the task file's own folder first, and are identified by their content.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.data.digests import files_within, state_hash
from bench.errors import UserError, error_sentence
from bench.evaluation.harness import DocumentSource
from bench.evaluation.task_planning import Splits, TaskDefinition, hub_options

if TYPE_CHECKING:
    from collections.abc import Iterator

BUILDERS = frozenset({"arrow", "csv", "json", "parquet", "text"})
"""Formats that `datasets` reads without a data set on the hub."""


@dataclass(frozen=True)
class NamedFiles:
    """A task's own files: all of them, and what is handed to `datasets` to load them."""

    task: str
    location: str
    files: tuple[Path, ...]
    options: dict[str, Any]

    def load(self, definition: TaskDefinition) -> tuple[Splits, DocumentSource]:
        """Return the splits and their source.

        Raises:
            UserError: `datasets` cannot read the files.
        """
        import datasets
        from datasets import config

        content = state_hash({str(file): file for file in self.files})
        # `datasets` knows a file again by its path, size and time, and would return what the file
        # held before.
        cache = Path(config.HF_DATASETS_CACHE) / "slimbench" / content
        path, part = definition["dataset_path"], definition.get("dataset_name")
        try:
            data: Splits = datasets.load_dataset(
                self.options.pop("path", path), part, cache_dir=str(cache), **self.options
            )
        except Exception as error:  # of a reader for each format
            reason = error_sentence(error.__cause__ or error)
            raise UserError(
                f"task {self.task}: its data {self.location} cannot be read: {reason}"
            ) from error
        # Where the folder lies is no part of its content.
        root = os.path.commonpath([file.parent for file in self.files])
        named = {os.path.relpath(file, root): file for file in self.files}
        return data, DocumentSource("file", self.location, None, state_hash(named))


def named_files(task: str, definition: TaskDefinition, folder: Path | None) -> NamedFiles | None:
    """Return the files of this machine that a task names, None if it names a data set of the hub.

    Raises:
        UserError: a file does not exist.
    """
    path, options = str(definition.get("dataset_path")), hub_options(definition)
    if path not in BUILDERS:
        place = _place(path, folder) if _is_path(path) else None
        if place is None or not place.is_dir():
            return None
        files = tuple(files_within(place).values())
        return NamedFiles(task, str(place), files, {**options, "path": str(place)})
    wanted = options.get("data_files")
    if wanted is None or any("://" in name for name in _names(wanted)):
        return None
    options["data_files"] = _resolved(task, wanted, folder)
    files = tuple(map(Path, _names(options["data_files"])))
    shown = str(files[0] if len(files) == 1 else files[0].parent)
    return NamedFiles(task, shown, files, options)


def _is_path(path: str) -> bool:
    return path.startswith(("/", "./", "../", "~"))


def _names(files: object) -> Iterator[str]:
    if isinstance(files, Mapping | list | tuple):
        for each in files.values() if isinstance(files, Mapping) else files:
            yield from _names(each)
    else:
        yield str(files)


def _resolved(task: str, files: Any, folder: Path | None) -> Any:
    """Return the same structure with absolute names, wildcards written out."""
    if isinstance(files, Mapping):
        return {split: _resolved(task, each, folder) for split, each in files.items()}
    found = [file for name in _names(files) for file in _matches(task, name, folder)]
    return found if len(found) != 1 else found[0]


def _matches(task: str, name: str, folder: Path | None) -> list[str]:
    places = [Path(name).expanduser()]
    if folder is not None and not places[0].is_absolute():
        places.insert(0, folder / name)
    for place in places:
        found = sorted(glob.glob(str(place), recursive=True))  # noqa: PTH207 (absolute patterns)
        if found:
            return [str(Path(file).absolute()) for file in found]
    looked = " or ".join(dict.fromkeys(str(place.parent.absolute()) for place in places))
    raise UserError(
        f"task {task}: its file {name!r} is not in {looked}: put it there, or give it by "
        f"benchmark.data.{task}=PATH"
    )


def _place(path: str, folder: Path | None) -> Path | None:
    places = [Path(path).expanduser()]
    if folder is not None and not places[0].is_absolute():
        places.insert(0, folder / path)
    return next((place for place in places if place.exists()), None)
