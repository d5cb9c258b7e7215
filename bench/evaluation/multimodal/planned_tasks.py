"""lmms-eval's task objects with loaded documents, and the documents selected by a limit."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import lmms_eval.evaluator
from lmms_eval.api.task import ConfigurableTask
from loguru import logger
from PIL.Image import Image

from bench.data.image_files import UnfitImage
from bench.errors import UserError, unknown_name
from bench.evaluation.harness import DocumentSource, number_within
from bench.evaluation.metrics import NO_LABEL, TaskAnswers
from bench.evaluation.multimodal import derived_metrics, task_data, task_index
from bench.evaluation.multimodal.task_data import ImageDocuments, open_document_images
from bench.evaluation.multimodal.task_needs import media_error
from bench.evaluation.row_files import DataRow
from bench.evaluation.task_planning import (
    TaskDefinition,
    definition_hash,
    evaluated_split,
    folders_of,
    task_code_errors,
    task_fault,
)
from bench.schema import BenchmarkConfig


class LoadedTask(ConfigurableTask):  # type: ignore[misc]  # the harness has no types
    """A task of lmms-eval that does not download its data."""

    def __init__(self, definition: TaskDefinition, rows: datasets.Dataset) -> None:
        # Before the base class, whose constructor calls `download`.
        self._rows = rows
        super().__init__(config=definition)

    def download(self, dataset_kwargs: dict[str, object] | None = None) -> None:
        """Install the documents, and a copy without images for code that reads only text."""
        split = evaluated_split(vars(self.config))
        images = task_data.image_columns(self._rows)
        self.dataset = datasets.DatasetDict({split: self._rows})
        self.dataset_no_image = datasets.DatasetDict({split: self._rows.remove_columns(images)})


@dataclass(frozen=True)
class PlannedTask:
    """One task with its documents.

    `indices` are the indices of its documents in the whole data set, and `headline` is its metric.
    `definition` is a hash of the harness's own definition, `folders` are those of its files.
    `doc_to_parts` is the function of a task with images between its texts.
    """

    name: str
    task: LoadedTask
    split: str
    indices: tuple[int, ...]
    source: DocumentSource
    headline: str
    definition: str
    folders: frozenset[Path]
    doc_to_parts: task_data.DocToParts | None = None

    def images(self, position: int) -> list[Image]:
        """Return the images shown with a document, given its position in `indices`."""
        with quiet_lmms_eval():
            rows = self.task.dataset[self.split]
            return task_data.open_document_images(self.task.doc_to_visual, rows, position)


def build_task(name: str, benchmark: BenchmarkConfig) -> PlannedTask:
    """Build one task.

    Raises:
        Unreachable: its data are neither cached nor reachable on the hub.
        UserError: the task is not supported, or the user's rows or metric do not fit it.
    """
    micro = benchmark.suite == "micro"
    file = task_index.FILES.find_micro(name) if micro else task_index.find_task_file(name)
    with quiet_lmms_eval():
        definition = task_index.read_task_definition(file, benchmark)
        identity = definition_hash(definition, task_index.FILES)
        documents = task_data.load_image_documents(name, definition, benchmark)
        limit = number_within(benchmark.limit, len(documents.rows))
        indices = select_documents(name, documents.rows, limit)
        rows = documents.rows.select(indices)
        if name in benchmark.data:
            _refuse_unlabelled_rows(name, rows, indices, benchmark)
            rows = _with_whole_labels(rows)
        task = _loaded_task(name, _with_local_images(definition, documents), rows, benchmark)
        parts = _doc_to_parts(task, evaluated_split(definition))
        _refuse_media(name, task)
        if name in benchmark.data:
            _refuse_unfit_rows(name, task, indices, benchmark)
        # Includes the functions of metrics, for the libraries that they use.
        identity = definition_hash([identity, task.aggregation()], task_index.FILES)
    headline = _headline(name, list(task.aggregation()), benchmark)
    split = evaluated_split(definition)
    folders = folders_of(task_index.FILES.find_included(name) or file)
    return PlannedTask(
        name, task, split, tuple(indices), documents.source, headline, identity, folders, parts
    )


def _doc_to_parts(task: LoadedTask, split: str) -> task_data.DocToParts | None:
    """Return the function that puts images between texts, None if the task has none.

    lmms-eval's chat models call it; without it they put images first, as here.
    """
    doc_to_messages = task.config.doc_to_messages
    if doc_to_messages is None:
        return None
    takes_options = "lmms_eval_specific_kwargs" in inspect.signature(doc_to_messages).parameters
    options = {"lmms_eval_specific_kwargs": task.lmms_eval_specific_kwargs} if takes_options else {}

    def doc_to_parts(document: DataRow) -> list[str | Image]:
        content = [
            part for each in doc_to_messages(document, **options) for part in each["content"]
        ]
        return [part["text"] if part["type"] == "text" else part["url"] for part in content]

    # MMMU's function changes the wording of all questions in its module on its first call. Calling
    # it before any question is built makes the wording the same in all runs.
    with contextlib.suppress(Exception):
        doc_to_parts(task.dataset[split][0])
    return doc_to_parts


def _refuse_media(name: str, task: LoadedTask) -> None:
    """Raise UserError if the first document contains media other than images."""
    rows = task.dataset[evaluated_split(vars(task.config))]
    try:
        shown: list[Any] = [*open_document_images(task.doc_to_visual, rows, 0)]
    except UnfitImage:
        return  # Detected and counted when the question is sent.
    for visual in shown:
        # The path of a video, or the samples of a sound.
        kind = "video" if isinstance(visual, str) else "audio" if isinstance(visual, dict) else None
        if kind is not None:
            raise media_error(name, kind)


def _with_local_images(definition: TaskDefinition, documents: ImageDocuments) -> TaskDefinition:
    """Point a task at its images; the harness's own function would load them from the hub."""
    changed = {**definition, "dataset_kwargs": None, "num_fewshot": 0}
    for key in ("test_split", "validation_split"):
        changed[key] = str(changed[key]).strip() if changed.get(key) else None
    # Only the scored split is loaded, so the harness must not search for others.
    changed["training_split"] = changed["fewshot_split"] = None
    if documents.images is not None:
        changed["doc_to_visual"] = documents.images.doc_to_visual
    return changed


def _loaded_task(
    name: str, definition: TaskDefinition, rows: datasets.Dataset, benchmark: BenchmarkConfig
) -> LoadedTask:
    if name not in benchmark.data:
        with task_code_errors("lmms-eval", name):
            return LoadedTask(definition, rows)
    try:
        return LoadedTask(definition, rows)
    except (Exception, SystemExit) as error:  # Functions of tasks may raise anything for such rows.
        key = f"benchmark.data.{name}={benchmark.data[name]}"
        raise UserError(f"{key}: the rows do not fit {name}: {task_fault(error)}") from error


def _refuse_unlabelled_rows(
    name: str, rows: datasets.Dataset, indices: Sequence[int], benchmark: BenchmarkConfig
) -> None:
    """Raise UserError if a row of a user's file has no label that its task can score.

    Even if missing answers are allowed, because the tasks' own code fails on such rows.
    """
    images = task_data.image_columns(rows)
    faults = {
        str(index): fault
        for index, document in zip(indices, rows.remove_columns(images), strict=True)
        if (fault := _label_fault(name, document))
    }
    if faults:
        raise UserError(
            f"benchmark.data.{name}={benchmark.data[name]}: "
            f"{TaskAnswers(len(indices), faults).describe()}; use a split with answers"
        )


def _refuse_unfit_rows(
    name: str, task: LoadedTask, indices: Sequence[int], benchmark: BenchmarkConfig
) -> None:
    """Raise UserError if too many images of a user's file cannot be shown.

    Checked before the model is loaded. Images of the hub are too many to be decoded twice; those
    that fail are detected when their questions are sent.
    """
    rows = task.dataset[evaluated_split(vars(task.config))]
    images = task_data.image_columns(rows)
    stored = rows
    for column in images:
        undecoded = datasets.Image(decode=False)
        is_list = not isinstance(rows.features[column], datasets.Image)
        stored = stored.cast_column(column, datasets.List(undecoded) if is_list else undecoded)
    key_of_file = f"benchmark.data.{name}={benchmark.data[name]}"
    unfit: dict[str, str] = {}
    known: dict[tuple[str, ...], str | None] = {}
    for position, document in enumerate(stored):
        # Data sets may have many questions per image, so each image is decoded once.
        parts = [part or {} for column in images for part in _as_list(document[column])]
        parts = parts or [document]
        key = tuple(
            hashlib.sha256(part.get("bytes") or b"").hexdigest() + str(part.get("path"))
            + str(part.get("imageId"))
            for part in parts
        )  # fmt: skip
        if key not in known:
            known[key] = _unfit_reason(task, rows, position)
        if known[key]:
            unfit[str(indices[position])] = str(known[key])
    answers = TaskAnswers(len(indices), unfit)
    if unfit and not answers.suffice(benchmark.allow_missing):
        raise UserError(
            f"{key_of_file}: {answers.describe()}; repair the file, or accept a share "
            f"by benchmark.allow_missing, now {benchmark.allow_missing:g}"
        )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


YES_OR_NO = ("pope", "mme")
"""Families of tasks whose own code fails on other labels, after the model has answered."""


def _label_fault(name: str, document: DataRow) -> str | None:
    """Return why a document has no reference answer, as in public test splits; None if it has one.

    A task whose answers are not in the documents has no fault.
    """
    columns = [column for column in ("answer", "answers") if column in document]
    if not columns:
        return None
    label, choices = document[columns[0]], document.get("choices")
    if _is_blank(label):
        return NO_LABEL
    if isinstance(label, int | float) and choices:
        return None if label in range(len(choices)) else NO_LABEL
    if _family(name, YES_OR_NO) and str(label).lower().strip(" .") not in ("yes", "no"):
        return f"its answer {label!r} is neither 'yes' nor 'no'"
    return None


def _is_blank(label: object) -> bool:
    """Return whether a label, or each of a list of labels, is a sign for "none"."""
    if isinstance(label, list):
        return all(map(_is_blank, label))
    if isinstance(label, dict):  # One annotator's answer.
        return _is_blank(label.get("answer"))
    if isinstance(label, int | float):
        return math.isnan(label) or label < 0
    return label is None or str(label).strip() in ("", "-1")


def _with_whole_labels(rows: datasets.Dataset) -> datasets.Dataset:
    """Convert the index of the right choice to an integer; other programs write 1 as 1.0."""
    kind = rows.features.get("answer")
    if "choices" in rows.features and str(getattr(kind, "dtype", "")).startswith("float"):
        return rows.cast_column("answer", datasets.Value("int64"))
    return rows


def _unfit_reason(task: LoadedTask, rows: datasets.Dataset, position: int) -> str | None:
    try:
        open_document_images(task.doc_to_visual, rows, position)
    except UnfitImage as error:
        return str(error)
    return None


def _headline(name: str, offered: list[str], benchmark: BenchmarkConfig) -> str:
    """Return the metric that represents a task: the configured one, or the harness's first."""
    metrics = [*offered, *derived_metrics.always_derived_from(offered)]
    metric = benchmark.metrics.get(name, metrics[0])
    if metric not in metrics:
        raise unknown_name(f"metric benchmark.metrics.{name}", metric, metrics)
    return metric


UnitRule: TypeAlias = tuple[tuple[str, ...], Callable[..., object]]
"""The columns that identify a unit, and a function from their values to its key."""
SCORING_UNITS: dict[str, UnitRule] = {
    # Two questions about an image; half of the score counts images with both answers correct.
    "mme": (("category", "question_id"), lambda category, question: (category, question)),
    # A question and its copies with rotated options.
    "mmbench": (("index",), lambda index: index % derived_metrics.ROTATION_STRIDE),
}
"""Documents that are scored together, by family of tasks."""


def select_documents(name: str, rows: datasets.Dataset, limit: int | None) -> list[int]:
    """Return the indices of the documents to score, in order.

    Documents that are scored together are selected together, so a limit may be slightly exceeded.
    """
    if limit is None or limit >= len(rows):
        return list(range(len(rows)))
    rule = _unit_rule(name)
    if rule is None:
        return list(range(limit))
    columns, key = rule
    keys = [key(*values) for values in zip(*(rows[column] for column in columns), strict=True)]
    kept = set(keys[:limit])
    return [index for index, unit in enumerate(keys) if unit in kept]


def scoring_unit(name: str, document: DataRow) -> str | None:
    """Return the name of a document's scoring unit, or None if it is scored alone."""
    rule = _unit_rule(name)
    if rule is None:
        return None
    columns, key = rule
    return str(key(*(document[column] for column in columns)))


def _unit_rule(name: str) -> UnitRule | None:
    """Return the columns and the function that define the units of a task, if it has any."""
    family = _family(name, SCORING_UNITS)
    return None if family is None else SCORING_UNITS[family]


def _family(name: str, families: Iterable[str]) -> str | None:
    """Return the family of tasks to which a task belongs."""
    return next((key for key in families if name == key or name.startswith(f"{key}_")), None)


@contextlib.contextmanager
def quiet_lmms_eval() -> Iterator[None]:
    """Suppress the logs, progress bars and prints of lmms-eval, and the bars of `datasets`."""
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    # All loggers, because task modules have their own.
    logger.disable("")
    bar = lmms_eval.api.task.tqdm

    def hidden_bar(*args: object, **options: object) -> object:
        # One bar sets `disable` explicitly, so functools.partial does not suffice to override it.
        return bar(*args, **{**options, "disable": True})

    for module in (lmms_eval.api.task, lmms_eval.evaluator):
        module.tqdm = hidden_bar
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for module in (lmms_eval.api.task, lmms_eval.evaluator):
            module.tqdm = bar
        logger.enable("")
        if bars:
            datasets.enable_progress_bars()
