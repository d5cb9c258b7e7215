"""Build lm-eval's task objects for the tasks of a benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypedDict, cast

from lm_eval.tasks import TaskManager

from bench.data import hub
from bench.errors import UserError, unknown_name
from bench.evaluation.harness import DocumentSource, hub_source, number_within
from bench.evaluation.local_files import LABELS
from bench.evaluation.metrics import NO_LABEL, TaskAnswers
from bench.evaluation.row_files import SUFFIXES, existing_path
from bench.evaluation.task_planning import (
    Splits,
    TaskDefinition,
    content_fingerprint,
    definition_hash,
    evaluated_split,
    folders_of,
    quiet_lm_eval,
    task_code_errors,
    task_fault,
)
from bench.evaluation.text import task_data, task_definitions, task_index
from bench.evaluation.text.task_index import Leaf, Outline
from bench.schema import BenchmarkConfig


class TextTask(Protocol):
    """The interface of a task of lm-eval."""

    OUTPUT_TYPE: str
    multiple_input: int
    eval_docs: Sequence[Any]
    DATASET_PATH: str | None
    DATASET_NAME: str | None
    config: object

    @property
    def task_name(self) -> str:
        """The name under which the harness reports the task."""

    def get_config(self, key: str) -> Any:
        """Return a setting, such as the number of shots."""

    def set_config(self, key: str, value: object, update: bool = False) -> None:
        """Change a setting; `update` changes some entries of a mapping."""

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

    def __iter__(self) -> Iterator[Any]:
        """Yield the tasks and groups directly below."""

    def add(self, item: object) -> None:
        """Add a task or a group, in place of one of the same name."""

    def get_all_tasks(self) -> list[TextTask]:
        """Return the tasks below the group."""


@dataclass(frozen=True)
class PlannedTask:
    """One scored name: a task, or a group of tasks whose scores the harness aggregates.

    `groups` is empty unless the name is that of a group. `headlines` are the metrics that represent
    the name, with their filter (None: the first one). A group without a score of its own is
    represented by the scores of its members. `definitions` are hashes of the definitions of tasks
    and groups, `folders` those of the task files and their code. `unlabelled` are, by task, the
    documents without a valid label.
    """

    name: str
    tasks: dict[str, TextTask]
    groups: dict[str, TaskGroup]
    sources: dict[str, DocumentSource]
    headlines: dict[str, tuple[str, str | None]]
    definitions: dict[str, str]
    folders: frozenset[Path]
    unlabelled: dict[str, tuple[int, ...]]


class BuiltTask(TypedDict):
    """A task that has been built, with facts about its data."""

    task: TextTask
    source: DocumentSource
    unlabelled: tuple[int, ...]


def outline_tasks(benchmark: BenchmarkConfig) -> list[Outline]:
    """Return the tasks and groups that a benchmark names, with tags expanded; loads no data.

    Raises:
        UserError: a name is unknown, or a task is named twice.
    """
    with quiet_lm_eval():
        index = task_index.index_of(benchmark.include)
        found: dict[str, Outline] = {}
        owners: dict[str, str] = {}
        for name in benchmark.tasks:
            if benchmark.suite == "micro":
                task_index.FILES.find_micro(name)
            for outline in task_index.outlines(name, index):
                for leaf in outline.leaves:
                    # A task that is listed twice would have its samples counted twice.
                    owner = owners.setdefault(leaf.task_name, name)
                    if owner != name:
                        raise UserError(
                            f"benchmark.tasks: {leaf.task_name} is in {owner} and in {name}: name "
                            "it once"
                        )
                found[outline.name] = outline
    return list(found.values())


def build_task(outline: Outline, benchmark: BenchmarkConfig) -> PlannedTask:
    """Build one task or one group of tasks.

    Raises:
        Unreachable: data are neither cached nor reachable on the hub.
        UserError: a task is not supported, or the user's rows or metric do not fit it.
    """
    with quiet_lm_eval():
        definitions = {
            leaf.task_name: _definition(leaf, outline, benchmark) for leaf in outline.leaves
        }
        data = _local_data(outline, benchmark)
        built: dict[str, BuiltTask] = {}
        unreachable: dict[str, hub.DatasetUnreachable] = {}
        for leaf in outline.leaves:
            name = leaf.task_name
            try:
                built[name] = _build_one(leaf, definitions[name], data.get(name), benchmark)
            except hub.DatasetUnreachable as error:
                # The tasks of a group often share one data set.
                unreachable[str(definitions[name].get("dataset_path") or error)] = error
        if len(unreachable) == 1:
            raise next(iter(unreachable.values()))
        if unreachable:
            raise hub.DatasetUnreachable("; ".join(map(str, unreachable.values())))
        for group in outline.groups.values():
            for child in list(group):
                if isinstance(child, Leaf):
                    group.add(built[child.task_name]["task"])
        return _planned_task(outline, built, benchmark)


def _definition(leaf: Leaf, outline: Outline, benchmark: BenchmarkConfig) -> TaskDefinition:
    """Return a task's definition with the shots and generation settings of the benchmark."""
    if benchmark.suite == "micro":
        file = task_index.FILES.find_micro(leaf.task_name)
        definition = task_definitions.read_micro_definition(file)
    else:
        definition = task_definitions.read_definition(leaf, trust_code=benchmark.trust_code)
    return task_definitions.with_shots(definition, benchmark, outline.chain(leaf.task_name))


def _local_data(outline: Outline, benchmark: BenchmarkConfig) -> dict[str, str]:
    """Return the user's file or folder of each task that has one.

    Raises:
        UserError: a folder for a group lacks one of its tasks.
    """
    names = [leaf.task_name for leaf in outline.leaves]
    data = {name: benchmark.data[name] for name in names if name in benchmark.data}
    for name in outline.groups:
        if name not in benchmark.data:
            continue
        key = f"benchmark.data.{name}={benchmark.data[name]}"
        folder = existing_path(benchmark.data[name], key)
        for leaf in names:
            if leaf not in data and name in outline.chain(leaf):
                data[leaf] = str(_member_data(folder, leaf, key))
    return data


def _member_data(folder: Path, task: str, key: str) -> Path:
    candidates = [folder / task, *(folder / f"{task}{suffix}" for suffix in SUFFIXES)]
    candidates += [folder / f"{task}{suffix}.gz" for suffix in (".jsonl", ".json")]
    found = next((each for each in candidates if each.exists()), None)
    if found is None:
        raise UserError(
            f"{key}: the folder of a group must have a file or a folder for each of its tasks, but "
            f"there is no {task}.jsonl"
        )
    return found


def _build_one(
    leaf: Leaf, definition: TaskDefinition, local: str | None, benchmark: BenchmarkConfig
) -> BuiltTask:
    """Build one task, with the source of its data and the documents without a label."""
    name = leaf.task_name
    if "class" in definition:
        if local:
            raise UserError(f"benchmark.data.{name}: {name} loads its data in Python code")
        task, source = _build_python(definition)
        return {"task": task, "source": source, "unlabelled": ()}
    file = leaf.entry.yaml_path
    data, source, unlabelled = task_data.load_documents(
        name, definition, benchmark, local=local, folder=file.parent if file else None
    )
    # With zero shots only the scored split is kept, because the harness would process all documents
    # of a training split first.
    present = set(data) if definition["num_fewshot"] else {evaluated_split(definition)}
    fitted = _with_documents(task_definitions.restrict_to_splits(definition, present), data)
    if local:
        task = _construct_local(fitted, f"benchmark.data.{name}={local}")
    else:
        if benchmark.suite != "micro":
            task_definitions.refuse_absent_examples(name, definition, data)
        with task_code_errors("lm-eval", name):
            task = _construct(fitted)
        _refuse_unknown_aggregation(name, task)
    # Embedded data have labels, and files of known tasks were checked when they were read.
    if benchmark.suite != "micro" and not (name in LABELS and local):
        unlabelled = _unlabelled_documents(name, task, benchmark)
    return {"task": task, "source": source, "unlabelled": unlabelled}


def _refuse_unknown_aggregation(name: str, task: TextTask) -> None:
    """Raise if lm-eval does not know how to aggregate a metric, which it says only when scoring."""
    aggregations: Mapping[str, object] = getattr(task, "aggregation", dict)()
    for metric, function in aggregations.items():
        if not callable(function):
            raise UserError(
                f"task {name!r}: the aggregation of its metric {metric!r} does not exist: name one "
                "of lm-eval, such as mean"
            )


def _with_documents(definition: TaskDefinition, data: Splits) -> TaskDefinition:
    """Pass loaded data to the harness, by its hook for data sets created in code."""
    return definition | {"custom_dataset": lambda **_: data}


def _build_python(definition: TaskDefinition) -> tuple[TextTask, DocumentSource]:
    """Build a task that is a Python class of the harness and loads its data itself."""
    try:
        task = _construct(definition)
    except (OSError, ValueError) as error:  # Raised by `datasets` if data are missing.
        raise hub.unreachable_error(str(definition["class"].DATASET_PATH), error) from error
    return task, _source_of(task)


def _source_of(task: TextTask) -> DocumentSource:
    """Describe the data of a task that the harness loaded itself."""
    data = getattr(task, "dataset", None)
    location = hub.dataset_name(task.DATASET_PATH or "", task.DATASET_NAME)
    # Documents that are created in code are identified by the task's name.
    if not isinstance(data, dict):
        return DocumentSource("harness", location, None, task.task_name)
    return hub_source(location, hub.commit_of(data), content_fingerprint(data))


def _construct_local(definition: TaskDefinition, key: str) -> TextTask:
    try:
        return _construct(definition)
    # Templates and task functions may raise anything for such rows.
    except (Exception, SystemExit) as error:
        reason = task_fault(error)
        raise UserError(f"{key}: the rows do not fit {definition['task']}: {reason}") from error


def _construct(definition: TaskDefinition) -> TextTask:
    # Without lm-eval's index of tasks, which takes seconds and is not needed here.
    task: TextTask
    (task,) = TaskManager(include_defaults=False).load([definition])["tasks"].values()
    return task


def _unlabelled_documents(name: str, task: TextTask, benchmark: BenchmarkConfig) -> tuple[int, ...]:
    """Return the scored documents without a valid label: not a choice, or an empty answer.

    The harness counts them as wrong, so that a public test split would score 0 %.

    Raises:
        UserError: there are more than the benchmark allows.
    """
    scored = number_within(benchmark.limit, len(task.eval_docs))
    documents = list(islice(task.eval_docs, scored))
    unlabelled = [i for i, document in enumerate(documents) if not _is_labelled(task, document)]
    answers = TaskAnswers(len(documents), {str(index): NO_LABEL for index in unlabelled})
    if unlabelled and not answers.suffice(benchmark.allow_missing):
        raise UserError(
            f"task {name}: {answers.describe()}; use a split with answers, or allow a larger share "
            f"than benchmark.allow_missing={benchmark.allow_missing:g}"
        )
    return tuple(unlabelled)


def _is_labelled(task: TextTask, document: object) -> bool:
    """Whether a document has an answer against which the harness can score."""
    # Such tasks score with their own code, and their target may be meaningless, as in ifeval.
    if callable(task.get_config("process_results")) or task.OUTPUT_TYPE == "loglikelihood_rolling":
        return True
    if task.multiple_input:
        return True
    target = task.doc_to_target(document)
    if task.get_config("doc_to_choice") is not None:
        return _is_label(target, task.doc_to_choice(document))
    return not _is_blank(target)


def _is_label(target: object, choices: Sequence[str]) -> bool:
    """Whether a target is an index of a choice, a choice, or a list of such."""
    if isinstance(target, list):
        return bool(target) and all(_is_label(each, choices) for each in target)
    if isinstance(target, int):
        return 0 <= target < len(choices)
    # Other types, such as those of numpy, are not checked.
    return target in choices if isinstance(target, str) else target is not None


def _is_blank(target: object) -> bool:
    """Whether a target is an empty string or a list of empty strings."""
    if isinstance(target, list):
        return all(map(_is_blank, target))
    return target is None or (isinstance(target, str) and not target.strip())


def _planned_task(
    outline: Outline, built: dict[str, BuiltTask], benchmark: BenchmarkConfig
) -> PlannedTask:
    name = outline.name
    tasks = {leaf: each["task"] for leaf, each in built.items()}
    groups = cast("dict[str, TaskGroup]", outline.groups)
    for leaf, task in tasks.items():
        _refuse_unsupported(leaf, task)
        # Set on the built task, because Python classes have their own settings.
        task_definitions.set_shots(task, benchmark, outline.chain(leaf))
        if benchmark.gen_kwargs and task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", dict(benchmark.gen_kwargs), update=True)
    definitions = _definitions(tasks, groups)
    headlines = {
        shown: _headline(shown, offered, benchmark)
        for shown, offered in _shown_metrics(name, tasks, groups)
    }
    files = [leaf.entry.yaml_path for leaf in outline.leaves]
    folders = frozenset().union(*(folders_of(file) for file in files if file))
    return PlannedTask(
        name,
        tasks,
        groups,
        {leaf: each["source"] for leaf, each in built.items()},
        headlines,
        definitions,
        folders,
        {leaf: each["unlabelled"] for leaf, each in built.items()},
    )


def _definitions(tasks: dict[str, TextTask], groups: dict[str, TaskGroup]) -> dict[str, str]:
    """Return a hash of every task as built by the harness, and of every group's aggregation."""
    # Functions of metrics are included, for the versions of the libraries that they use.
    told: dict[str, object] = {
        leaf: [type(task), task.config, task.aggregation()] for leaf, task in tasks.items()
    }
    for name, group in groups.items():
        members = [task.task_name for task in group.get_all_tasks()]
        told[name] = [members, group.aggregate_metric_list]
    return {name: definition_hash(each, task_index.FILES) for name, each in told.items()}


def _refuse_unsupported(name: str, task: TextTask) -> None:
    if getattr(task, "MULTIMODAL", False):
        raise task_definitions.multimodal_error(name)
    if getattr(task, "UNSAFE_CODE", False):
        raise task_definitions.unsafe_code_error(name)


def _shown_metrics(
    name: str, tasks: dict[str, TextTask], groups: dict[str, TaskGroup]
) -> Iterator[tuple[str, list[str]]]:
    """Yield the names of result rows for a task or group, with the metrics reported in each."""
    if name not in groups:
        yield name, list(tasks[name].aggregation())
    elif aggregated := groups[name].aggregate_metric_list:
        yield name, list(dict.fromkeys(metric.metric for metric in aggregated))
    else:
        for child in groups[name]:
            inner = child.task_name if hasattr(child, "task_name") else child.name
            yield from _shown_metrics(inner, tasks, groups)


def _headline(name: str, offered: list[str], benchmark: BenchmarkConfig) -> tuple[str, str | None]:
    """Split `METRIC` or `METRIC,FILTER`, the harness's notation; default: the first metric."""
    metric, _, chosen = benchmark.metrics.get(name, offered[0]).partition(",")
    if metric not in offered:
        raise unknown_name(f"metric benchmark.metrics.{name}", metric, offered)
    return metric, chosen or None
