"""Definitions of lm-eval's tasks, found by name without its full index, and their documents.

Documents and texts of perplexities come from a file, the embedded world or the hub.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict

import datasets
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from bench.data import calibration, hub
from bench.data.hub import unreachable_error
from bench.data.synthetic.world import documents, fingerprint
from bench.data.synthetic.world import documents_by_split as world_splits
from bench.errors import UserError, nearest
from bench.evaluation import local_files
from bench.evaluation.harness import DocumentSource, file_source, hub_source
from bench.evaluation.local_files import TEXT_COLUMNS, RowUse
from bench.evaluation.row_files import SUFFIXES, RowFile, existing_path, read_rows
from bench.evaluation.task_planning import (
    Splits,
    TaskDefinition,
    TaskFiles,
    content_fingerprint,
    evaluated_split,
    load_from_hub,
    task_code_errors,
)
from bench.schema import BenchmarkConfig, PerplexityConfig


class Documents(NamedTuple):
    """The splits of a task and where they came from; `unlabelled` rows have no valid label."""

    splits: Splits
    source: DocumentSource
    unlabelled: tuple[int, ...] = ()


def load_documents(name: str, definition: TaskDefinition, benchmark: BenchmarkConfig) -> Documents:
    """Return the splits that the benchmark gives a task, and where they came from."""
    path = benchmark.data.get(name)
    if path:
        local = local_files.load_local_rows(name, path, _row_use(name, definition, benchmark))
        return Documents(local.splits, local.source, local.unlabelled)
    if benchmark.suite == "micro":
        data = _documents_from_function(definition, only=_single_split(definition))
        return Documents(data, world_source(name))
    if "custom_dataset" in definition:
        data = _documents_from_function(definition)
        source = DocumentSource("harness", name, None, content_fingerprint(data))
        return Documents(data, source)
    return Documents(*load_from_hub(definition))


def _row_use(name: str, definition: TaskDefinition, benchmark: BenchmarkConfig) -> RowUse:
    # The harness applies the limit after a task's own code, which may drop rows; those of the known
    # tasks keep them all.
    keeps_rows = name in TEXT_COLUMNS or "process_docs" not in definition
    return RowUse(
        evaluated_split(definition),
        scored=benchmark.limit if keeps_rows else None,
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
    """Return the splits of one task of the world; our task files name this as `custom_dataset`.

    `only` restricts the result to the scored split, so that nothing else is generated. Further
    arguments are metadata of the task, which the harness passes along; they are ignored.
    """
    rows = {only: documents(world, "test")} if only else world_splits(world)
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_list(split) for name, split in rows.items()}
    )


def world_source(task: str) -> DocumentSource:
    """Describe the embedded documents of a task."""
    return DocumentSource("embedded", f"world:{task}", None, fingerprint(task))


_WIKITEXT2 = ("Salesforce/wikitext", "wikitext-2-raw-v1")

# C4 is measured on the first validation shard alone, as in GPTQ's scripts: the published numbers
# depend on it.
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
    """Read the text that a perplexity names, or the file that replaces it."""
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
            # Without a byte order mark, which would be a token of its own.
            documents = [file.read_text(encoding="utf-8-sig")]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{key}: {file.name} is not UTF-8 text: {error}") from error
    if not any(text.strip() for text in documents):
        raise UserError(f"{key}: {file.name} holds no text")
    return documents, file_source([file])


FILES = TaskFiles("lm_eval", "lm-eval", ours=Path(__file__).parent / "tasks" / "micro")


class TextTask(Protocol):
    """A task of lm-eval, as far as we use it ourselves."""

    OUTPUT_TYPE: str
    multiple_input: bool
    DATASET_PATH: str | None
    DATASET_NAME: str | None
    config: object

    @property
    def task_name(self) -> str:
        """The name under which the harness reports the task."""

    def get_config(self, key: str) -> int | None:
        """Return a setting, such as the number of shots."""

    def set_config(self, key: str, value: int) -> None:
        """Change a setting."""

    def set_fewshot_seed(self, seed: int) -> None:
        """Seed the choice of few-shot examples."""

    def aggregation(self) -> dict[str, object]:
        """Return a function per metric."""

    def doc_to_choice(self, document: object, rule: object = None) -> list[str]:
        """Return the choices of a multiple-choice question."""

    def doc_to_text(self, document: object, rule: object = None) -> str | int:
        """Return the question, or the number of the right one among several contexts."""

    def doc_to_target(self, document: object, rule: object = None) -> object:
        """Return the right answer, or its number."""

    def resolve_field(self, document: object, field: object = None) -> str | None:
        """Return a field of a document, given by its name or a template."""

    def build_qa_turn(self, **parts: object) -> list[Any]:
        """Return the messages that ask a question and answer it."""


class AggregatedMetric(Protocol):
    """A metric that a group reports over its tasks."""

    metric: str


class TaskGroup(Protocol):
    """A group of tasks of lm-eval."""

    aggregate_metric_list: list[AggregatedMetric] | None

    def get_all_tasks(self) -> list[TextTask]:
        """Return the tasks below the group."""


class LoadedTasks(TypedDict):
    """Tasks and groups that lm-eval's task manager builds from names."""

    tasks: dict[str, TextTask]
    groups: dict[str, TaskGroup]


@cache
def find_task_file(name: str) -> Path | None:
    """Return the file of a task, or None for a group or a tag.

    Raises:
        UserError: no task, group or tag has this name.
    """
    return FILES.find_included(name) or _search_task_files(name)


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
    names: set[bytes] = set()
    is_group = False
    for file in sorted(FILES.harness_folder.rglob("*.yaml")):
        content = file.read_bytes()
        if task.search(content) and not group.search(content):
            return file
        # A name that only ever occurs as a group, a tag or a member of one has no file of its own;
        # the harness's index must resolve it.
        is_group = is_group or bool(mention.search(content) or member.search(content))
        names.update(any_name.findall(content))
    if is_group:
        return None
    raise _unknown_task(name, [each.decode() for each in names])


def _key_line_pattern(keys: list[str], name: str | None = None) -> re.Pattern[bytes]:
    """Match a line of YAML that gives one of the keys this value, or any value."""
    value = r"([\w.+-]+)" if name is None else re.escape(name)
    key = "|".join(keys)
    line = rf"^[\"']?(?:{key})[\"']?[ \t]*:[ \t]*[\"']?{value}[\"']?[ \t]*\r?$"
    return re.compile(line.encode(), re.MULTILINE)


def _unknown_task(name: str, names: list[str]) -> UserError:
    """Build the error for a task that does not exist, with the nearest name as a hint."""
    close = nearest(name, names)
    hint = f"did you mean {close!r}?" if close else "`lm-eval ls tasks` lists them"
    return UserError(f"unknown task {name!r} in benchmark.tasks: {hint}")


def read_task_definition(file: Path) -> TaskDefinition:
    """Return a definition with its includes merged and its functions imported.

    Raises:
        UserError: the task executes generated code, or needs a package that is not installed.
        Unreachable: its functions load data from the hub on import.
    """
    if file.parent == FILES.ours:
        return _read_micro_definition(file)
    # Checked before functions are resolved: resolving imports the task's Python modules.
    if load_yaml(file, resolve_func=False).get("unsafe_code"):
        raise unsafe_code_error(file.stem)
    try:
        with task_code_errors("lm-eval", file.stem):
            definition: TaskDefinition = load_yaml(file)
    except ImportError as error:
        raise UserError(
            f"lm-eval's {file.name} needs a package that is not installed: {error}"
        ) from error
    except OSError as error:
        raise unreachable_error(f"data loaded by {file.name}", error) from error
    return definition


def unsafe_code_error(task: str) -> UserError:
    """Build the error for a task that runs what a model wrote."""
    return UserError(
        f"task {task!r} executes generated code, which slimbench refuses: remove it from "
        "benchmark.tasks"
    )


def _read_micro_definition(file: Path) -> TaskDefinition:
    """Read one of our files; its include is relative to the harness's folder."""
    # lm-eval resolves includes relative to the including file, and where lm-eval is installed is
    # known at run time only; so the include is taken out and merged here.
    ours: TaskDefinition = load_yaml(file, recursive=False)
    theirs: TaskDefinition = load_yaml(FILES.harness_folder / ours.pop("include"))
    return {**theirs, **ours}


def num_shots(definition: TaskDefinition, requested: int | None) -> int:
    """Return a task's number of shots by the harness's rule."""
    # A task that declares 0 shots stays at 0, as in lm-eval: its prompt is written for zero shots.
    own = definition.get("num_fewshot")
    return int(own or 0) if own == 0 or requested is None else requested


def restrict_to_splits(definition: TaskDefinition, present: set[str]) -> TaskDefinition:
    """Return the definition with only the splits in `present`.

    If nothing else is left to draw few-shot examples from, they come from the scored split. It is
    then declared as the test split, because only there does the harness exclude the scored document
    from its own examples.
    """
    scored = evaluated_split(definition)
    keys = ("training_split", "validation_split", "test_split", "fewshot_split")
    kept = {key: name if (name := definition.get(key)) in present else None for key in keys}
    examples = dict(definition.get("fewshot_config") or {})
    if examples.get("split") not in present:
        examples.pop("split", None)
    if not {*kept.values(), examples.get("split")} - {None, scored} and "samples" not in examples:
        kept = dict.fromkeys(keys) | {"test_split": scored, "fewshot_split": scored}
    return {**definition, **kept, "fewshot_config": examples or None}


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
        raise _unknown_task(name, manager.all_tasks)
    return sorted(manager.task_index[name].tags) if name in manager.all_tags else [name]


def load_task_group(name: str) -> LoadedTasks:
    """Let the harness build a group with all its members."""
    loaded: LoadedTasks = _task_manager().load([name])
    return loaded


def group_data_sets(name: str) -> list[str]:
    """Return the hub data sets that the members of a group read."""
    return sorted(_member_data_sets(name))


def _member_data_sets(name: str) -> set[str]:
    entry = _task_manager().task_index.get(name)
    if entry is None:
        return set()
    config: TaskDefinition = entry.cfg or {}
    members = config.get("task", [])
    if isinstance(members, str):
        return {str(config.get("dataset_path", name))}
    named = [m if isinstance(m, str) else str(m.get("task") or m.get("group")) for m in members]
    return set().union(*(_member_data_sets(member) for member in [*named, *sorted(entry.tags)]))
