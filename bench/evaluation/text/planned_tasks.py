"""lm-eval's task objects for the names that a benchmark lists, built on the data found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol, cast

from lm_eval.tasks import TaskManager

from bench.data import hub
from bench.errors import UserError, unknown_name
from bench.evaluation.harness import DocumentSource, hub_source
from bench.evaluation.local_files import LABELS
from bench.evaluation.metrics import NO_LABEL, TaskAnswers
from bench.evaluation.task_planning import (
    CONFIG_SOURCE,
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
from bench.evaluation.text import task_data
from bench.evaluation.text.task_data import AggregatedMetric, TaskGroup, TextTask
from bench.schema import BenchmarkConfig


@dataclass(frozen=True)
class PlannedTask:
    """One scored name: a task, or a group of tasks whose scores the harness aggregates.

    `groups` is empty unless the name is that of a group. `headline` is the metric that represents
    the name, and the filter through which it is read; filter None means the first one.
    `definitions` holds a hash of each task's and each group's definition, `folders` those of the
    task files and of their code. `unlabelled` are the documents whose label means nothing.
    """

    name: str
    tasks: dict[str, TextTask]
    groups: dict[str, TaskGroup]
    sources: dict[str, DocumentSource]
    headline: tuple[str, str | None]
    definitions: dict[str, str]
    folders: frozenset[Path]
    unlabelled: tuple[int, ...] = ()


def scored_names(benchmark: BenchmarkConfig) -> list[str]:
    """Return the names to score: those of `tasks`, with each tag expanded to its tasks."""
    if benchmark.suite == "micro":
        return list(benchmark.tasks)
    with quiet_lm_eval():
        expanded = [task for name in benchmark.tasks for task in task_data.expand_tag(name)]
    return list(dict.fromkeys(expanded))


def build_task(name: str, benchmark: BenchmarkConfig) -> PlannedTask:
    """Build one task or one group of tasks.

    Raises:
        Unreachable: its data are neither cached nor reachable on the hub.
        UserError: the task is not supported, or the user's rows or metric do not fit it.
    """
    micro = benchmark.suite == "micro"
    file = task_data.FILES.find_micro(name) if micro else task_data.find_task_file(name)
    with quiet_lm_eval():
        if file is None:
            return _build_group(name, benchmark)
        definition = task_data.read_task_definition(file)
        task, source, unlabelled = _build_one(name, definition, benchmark)
    planned = _planned_task(name, {name: task}, {}, {name: source}, benchmark)
    # The embedded data have their labels, and a file of a known task has been checked.
    if not (micro or (name in LABELS and name in benchmark.data)):
        unlabelled = _unlabelled_documents(name, task, benchmark)
    return replace(planned, unlabelled=unlabelled)


class ChoiceTask(Protocol):
    """A multiple-choice task of lm-eval; with `multiple_input` the contexts are the choices."""

    multiple_input: int
    eval_docs: Iterable[object]

    def doc_to_target(self, document: object) -> object:
        """Return the right choice, its index, or a list of such."""

    def doc_to_choice(self, document: object) -> list[str]:
        """Return the choices."""


def _unlabelled_documents(name: str, task: TextTask, benchmark: BenchmarkConfig) -> tuple[int, ...]:
    """Return the scored documents whose label is none of their choices.

    The harness counts them as wrong, so that a public test split (label -1) scores 0 %.

    Raises:
        UserError: they are more than the benchmark allows.
    """
    choosing = cast("ChoiceTask", task)
    if task.OUTPUT_TYPE != "multiple_choice" or choosing.multiple_input:
        return ()
    documents = list(islice(choosing.eval_docs, benchmark.limit))
    unlabelled = [
        index
        for index, document in enumerate(documents)
        if not _is_label(choosing.doc_to_target(document), choosing.doc_to_choice(document))
    ]
    answers = TaskAnswers(len(documents), {str(index): NO_LABEL for index in unlabelled})
    if unlabelled and not answers.suffice(benchmark.allow_missing):
        raise UserError(
            f"task {name}: {answers.describe()}; give a split that holds the answers, or accept a "
            f"share by benchmark.allow_missing, now {benchmark.allow_missing:g}"
        )
    return tuple(unlabelled)


def _is_label(target: object, choices: Sequence[str]) -> bool:
    """Whether a target is an index of a choice, a choice, or a list of such."""
    if isinstance(target, list):
        return bool(target) and all(_is_label(each, choices) for each in target)
    if isinstance(target, int):
        return 0 <= target < len(choices)
    # Other types, such as numpy's, are left to the harness.
    return target in choices if isinstance(target, str) else target is not None


def _build_group(name: str, benchmark: BenchmarkConfig) -> PlannedTask:
    if name in benchmark.data:
        raise UserError(f"benchmark.data.{name}: {name} is a group; list its tasks instead")
    try:
        loaded = task_data.load_task_group(name)
    except (OSError, ValueError) as error:  # raised by `datasets` when data are missing
        raise hub.unreachable_error(", ".join(task_data.group_data_sets(name)), error) from error
    sources = {leaf: _source_of(task) for leaf, task in loaded["tasks"].items()}
    return _planned_task(name, loaded["tasks"], loaded["groups"], sources, benchmark)


def _build_one(
    name: str, definition: TaskDefinition, benchmark: BenchmarkConfig
) -> tuple[TextTask, DocumentSource, tuple[int, ...]]:
    """Build one task; return it with the source of its data and the documents without a label."""
    if "class" in definition:
        if name in benchmark.data:
            raise UserError(f"benchmark.data.{name}: {name} loads its data in Python code")
        return *_build_python(definition), ()
    definition["num_fewshot"] = task_data.num_shots(definition, benchmark.num_fewshot)
    data, source, unlabelled = task_data.load_documents(name, definition, benchmark)
    # With zero shots only the scored split is kept: the harness would process every document of
    # a training split, however large, before it scores the first question.
    present = set(data) if definition["num_fewshot"] else {evaluated_split(definition)}
    fitted = _with_documents(task_data.restrict_to_splits(definition, present), data)
    if name not in benchmark.data:
        with task_code_errors("lm-eval", name):
            return _construct(fitted), source, ()
    task = _construct_local(fitted, f"benchmark.data.{name}={benchmark.data[name]}")
    return task, source, unlabelled


def _with_documents(definition: TaskDefinition, data: Splits) -> TaskDefinition:
    """Make the harness take our data, by the hook that it offers for data sets made in code."""
    return definition | {"custom_dataset": lambda **_: data}


def _build_python(definition: TaskDefinition) -> tuple[TextTask, DocumentSource]:
    """Build a task that is a Python class of the harness and loads its data itself."""
    try:
        task = _construct(definition)
    except (OSError, ValueError) as error:  # as in `_build_group`
        raise hub.unreachable_error(str(definition["class"].DATASET_PATH), error) from error
    return task, _source_of(task)


def _source_of(task: TextTask) -> DocumentSource:
    """Describe the data of a task that the harness loaded itself."""
    data = getattr(task, "dataset", None)
    location = hub.dataset_name(task.DATASET_PATH or "", task.DATASET_NAME)
    # No data set of `datasets`, for instance documents made in code: the task's name must identify
    # it.
    if not isinstance(data, dict):
        return DocumentSource("harness", location, None, task.task_name)
    return hub_source(location, hub.commit_of(data), content_fingerprint(data))


def _construct_local(definition: TaskDefinition, key: str) -> TextTask:
    try:
        return _construct(definition)
    # Templates and task functions raise anything on such rows.
    except (Exception, SystemExit) as error:
        reason = task_fault(error)
        raise UserError(f"{key}: the rows do not fit {definition['task']}: {reason}") from error


def _construct(definition: TaskDefinition) -> TextTask:
    # Without its default index, which takes seconds to build and is not needed for a full
    # definition.
    task: TextTask
    (task,) = TaskManager(include_defaults=False).load([definition])["tasks"].values()
    return task


def _planned_task(
    name: str,
    tasks: dict[str, TextTask],
    groups: dict[str, TaskGroup],
    sources: dict[str, DocumentSource],
    benchmark: BenchmarkConfig,
) -> PlannedTask:
    for leaf, task in tasks.items():
        _refuse_unsupported(leaf, task)
        # Set on the built task, since members of a group and Python classes never pass through
        # `_build_one`.
        own = {"num_fewshot": task.get_config("num_fewshot")}
        task.set_config("num_fewshot", task_data.num_shots(own, benchmark.num_fewshot))
    aggregated = groups[name].aggregate_metric_list if groups else None
    offered = _offered_metrics(aggregated, tasks)
    definitions = _definitions(tasks, groups)
    headline = _headline(name, offered, benchmark)
    folders = frozenset().union(*(_folders(leaf, task) for leaf, task in tasks.items()))
    return PlannedTask(name, tasks, groups, sources, headline, definitions, folders)


def _folders(name: str, task: TextTask) -> frozenset[Path]:
    # Of the members of a group lm-eval says where their files lie; of the others we know it.
    metadata = getattr(task.config, "metadata", None) or {}
    file = Path(str(metadata.get(CONFIG_SOURCE)))
    try:
        found = file if file.is_file() else task_data.find_task_file(name)
    except UserError:  # a member that its group makes, without a file
        found = None
    return folders_of(found) if found else frozenset()


def _definitions(tasks: dict[str, TextTask], groups: dict[str, TaskGroup]) -> dict[str, str]:
    """Return the hash of every task as the harness built it, and of what a group makes of them."""
    told: dict[str, object] = {leaf: [type(task), task.config] for leaf, task in tasks.items()}
    for name, group in groups.items():
        members = [task.task_name for task in group.get_all_tasks()]
        told[name] = [members, group.aggregate_metric_list]
    return {name: definition_hash(each, task_data.FILES) for name, each in told.items()}


def _refuse_unsupported(name: str, task: TextTask) -> None:
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {name!r} needs images or audio; lm_eval benchmarks are text only")
    if getattr(task, "UNSAFE_CODE", False):
        raise task_data.unsafe_code_error(name)


def _offered_metrics(
    aggregated: Iterable[AggregatedMetric] | None, tasks: dict[str, TextTask]
) -> list[str]:
    if aggregated:
        return [metric.metric for metric in aggregated]
    return list(dict.fromkeys(metric for task in tasks.values() for metric in task.aggregation()))


def _headline(name: str, offered: list[str], benchmark: BenchmarkConfig) -> tuple[str, str | None]:
    """Split `METRIC` or `METRIC,FILTER`, the harness's notation; default: the first metric."""
    metric, _, chosen = benchmark.metrics.get(name, offered[0]).partition(",")
    if metric not in offered:
        raise unknown_name(f"metric benchmark.metrics.{name}", metric, offered)
    return metric, chosen or None
