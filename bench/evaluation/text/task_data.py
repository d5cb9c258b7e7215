"""Load the documents of a task or a perplexity text from a file, the embedded world or the hub."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from bench.data import calibration, hub
from bench.data.digests import files_within, state_hash
from bench.data.synthetic.world import documents, fingerprint
from bench.data.synthetic.world import documents_by_split as world_splits
from bench.errors import UserError, error_sentence
from bench.evaluation import local_files
from bench.evaluation.harness import DocumentSource, file_source, hub_source
from bench.evaluation.local_files import TEXT_COLUMNS, RowUse
from bench.evaluation.row_files import SUFFIXES, RowFile, existing_path, read_rows
from bench.evaluation.task_planning import (
    Splits,
    TaskDefinition,
    content_fingerprint,
    evaluated_split,
    hub_options,
    load_from_hub,
)
from bench.schema import BenchmarkConfig, PerplexityConfig


class Documents(NamedTuple):
    """The splits of a task and their source; `unlabelled` rows have no valid label."""

    splits: Splits
    source: DocumentSource
    unlabelled: tuple[int, ...] = ()


def load_documents(
    name: str,
    definition: TaskDefinition,
    benchmark: BenchmarkConfig,
    *,
    local: str | None = None,
    folder: Path | None = None,
) -> Documents:
    """Return the splits of a task in a benchmark, and their source.

    `local` is the user's file or folder for the task. `folder` is that of the task file, which may
    contain data files that the task names.
    """
    if local:
        found = local_files.load_local_rows(name, local, _row_use(name, definition, benchmark))
        return Documents(found.splits, found.source, found.unlabelled)
    if benchmark.suite == "micro":
        data = _documents_from_function(definition, only=_single_split(definition))
        return Documents(data, world_source(name))
    if "custom_dataset" in definition:
        data = _documents_from_function(definition)
        source = DocumentSource("harness", name, None, content_fingerprint(data))
        return Documents(data, source)
    own = named_files(name, definition, folder)
    if own is not None:
        return Documents(*own.load(definition))
    return Documents(*load_from_hub(definition))


def _row_use(name: str, definition: TaskDefinition, benchmark: BenchmarkConfig) -> RowUse:
    # The harness applies the limit after the task's own code, which may drop rows. The code of the
    # known tasks does not.
    keeps_rows = name in TEXT_COLUMNS or "process_docs" not in definition
    return RowUse(
        evaluated_split(definition),
        # A fraction refers to all rows, whose number is not known yet.
        scored=benchmark.limit if keeps_rows and isinstance(benchmark.limit, int) else None,
        examples=bool(definition.get("num_fewshot")),
        allow_missing=benchmark.allow_missing,
    )


def _single_split(definition: TaskDefinition) -> str | None:
    """Return the single split needed by a task without few-shot examples, else None."""
    return None if definition.get("num_fewshot") else evaluated_split(definition)


def _documents_from_function(definition: TaskDefinition, **options: str | None) -> Splits:
    arguments = {**(definition.get("metadata") or {}), **(definition.get("dataset_kwargs") or {})}
    data: Splits = definition["custom_dataset"](**arguments, **options)
    return data


def embedded_splits(*, world: str, only: str | None = None, **_: object) -> datasets.DatasetDict:
    """Return the splits of one embedded task; the suite's task files use it as `custom_dataset`.

    `only` restricts the result to the scored split, so that nothing else is generated. Other
    arguments are metadata of the task, which the harness passes as well; they are ignored.
    """
    rows = {only: documents(world, "test")} if only else world_splits(world)
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_list(split) for name, split in rows.items()}
    )


def world_source(task: str) -> DocumentSource:
    """Describe the embedded documents of a task."""
    return DocumentSource("embedded", f"world:{task}", None, fingerprint(task))


_WIKITEXT2 = ("Salesforce/wikitext", "wikitext-2-raw-v1")

# As in GPTQ's scripts, and hence in published results, C4 is its first validation shard.
_C4_SHARD = ("allenai/c4", "en/c4-validation.00000-of-00008.json.gz")


@dataclass(frozen=True)
class PlannedText:
    """A text as a sequence of documents, with the perplexity to be measured on it."""

    name: str
    config: PerplexityConfig
    documents: Sequence[str]
    split: str
    source: DocumentSource


def load_perplexity_text(name: str, config: PerplexityConfig) -> PlannedText:
    """Read the text of a perplexity, or the file that replaces it."""
    split = "validation" if config.text == "c4" else "test"
    if config.path is not None:
        documents, source = _text_from_file(
            f"benchmark.perplexity.{name}.path={config.path}", config.path
        )
    elif config.text == "english":
        documents = [calibration.test_text()]
        source = DocumentSource("embedded", "english", None, calibration.fingerprint())
    else:
        documents, source = _text_from_hub(config, split)
    return PlannedText(name, config, documents, split, source)


def _text_from_hub(config: PerplexityConfig, split: str) -> tuple[Sequence[str], DocumentSource]:
    if config.text == "c4":
        file = hub.download_file(*_C4_SHARD)
        rows = read_rows(file, hub.dataset_name(*_C4_SHARD))
        source = hub_source(hub.dataset_name(*_C4_SHARD), hub.commit_in_path(file), file.name)
        return [row["text"] for row in rows], source
    data = hub.load_dataset(*_WIKITEXT2)
    loaded = str(data[split]._fingerprint)
    return data[split]["text"], hub_source(
        hub.dataset_name(*_WIKITEXT2), hub.commit_of(data), loaded
    )


def _text_from_file(key: str, path: str) -> tuple[Sequence[str], DocumentSource]:
    """Read the column `text` of a table, or any other file as one document of plain text."""
    file = existing_path(path, key)
    if not file.is_file():
        raise UserError(f"{key} is a folder; give a file")
    if file.suffix in SUFFIXES:
        documents: list[str] = []
        rows = RowFile(file, key, ("text",))
        for row in rows:
            if not isinstance(row["text"], str):
                raise rows.fault("has no string in column 'text'")
            documents.append(row["text"])
    else:
        try:
            # Without a byte order mark, which would become a token.
            documents = [file.read_text(encoding="utf-8-sig")]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{key}: {file.name} is not UTF-8 text: {error}") from error
    if not any(text.strip() for text in documents):
        raise UserError(f"{key}: {file.name} holds no text")
    return documents, file_source([file])


BUILDERS = frozenset({"arrow", "csv", "json", "parquet", "text"})
"""Formats that `datasets` reads without a data set on the hub."""


@dataclass(frozen=True)
class NamedFiles:
    """Local data files named in a task file, with the arguments of `datasets` to load them.

    lm-eval passes them to `datasets`, which resolves relative names against the working folder and
    caches files by path and time. Here names are first resolved against the folder of the task
    file, and files are identified by their content.
    """

    task: str
    location: str
    files: tuple[Path, ...]
    options: dict[str, Any]

    def load(self, definition: TaskDefinition) -> tuple[Splits, DocumentSource]:
        """Return the splits and their source.

        Raises:
            UserError: `datasets` cannot read the files.
        """
        content = state_hash({str(file): file for file in self.files})
        # A cache folder per content, because `datasets` caches files by path, size and time.
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "slimbench" / content
        path, part = definition["dataset_path"], definition.get("dataset_name")
        try:
            data: Splits = datasets.load_dataset(
                self.options.pop("path", path), part, cache_dir=str(cache), **self.options
            )
        except Exception as error:  # Each format has its own reader.
            reason = error_sentence(error.__cause__ or error)
            empty = [file.name for file in self.files if not file.stat().st_size]
            if empty:
                reason = f"{empty[0]} is empty"
            raise UserError(
                f"task {self.task}: its data {self.location} cannot be read: {reason}"
            ) from error
        # Relative to the common folder, whose location is not part of the content.
        root = os.path.commonpath([file.parent for file in self.files])
        named = {os.path.relpath(file, root): file for file in self.files}
        return data, DocumentSource("file", self.location, None, state_hash(named))


def named_files(task: str, definition: TaskDefinition, folder: Path | None) -> NamedFiles | None:
    """Return the local files that a task names, or None if it names a data set of the hub.

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
    """Return the same structure with absolute names and expanded wildcards."""
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
