"""Local files of the user that replace a task's data set, for both harnesses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import datasets
import pyarrow
from pyarrow import parquet

from bench.errors import UserError
from bench.evaluation.harness import DocumentSource, file_source
from bench.evaluation.metrics import NO_LABEL, TaskAnswers
from bench.evaluation.row_files import (
    SUFFIXES,
    UNREADABLE,
    DataRow,
    RowFile,
    existing_path,
)

TEXT_COLUMNS = {
    "boolq": ("passage", "question", "label"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
    "rte": ("sentence1", "sentence2", "label"),
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "mathqa": ("Problem", "options", "correct"),
}
"""Columns of the real data sets that each text task reads."""
IMAGE_TASK_COLUMNS = {
    "gqa": ("imageId", "question", "answer"),
    "vqav2_val": ("question", "answers", "question_id", "image"),
    "scienceqa_img": ("image", "question", "choices", "answer", "hint"),
    "textvqa_val": ("image", "question", "question_id", "answers", "ocr_tokens"),
    "pope": ("question_id", "question", "answer", "category", "image"),
    "mme": ("question_id", "image", "question", "answer", "category"),
    "mmbench_en_dev_static": (
        "index", "question", "hint", "answer", "A", "B", "C", "D", "category", "L2-category",
        "image", "source", "split",
    ),
    "ocrbench": ("image", "question", "answer", "dataset", "question_type"),
    "chartqa": ("image", "question", "answer", "type"),
    "docvqa_val": ("image", "question", "answers", "questionId"),
    "mmmu_val": ("id", "question", "options", "question_type", "answer", "image_1"),
    "mmstar": ("index", "image", "question", "answer", "category", "l2_category"),
    "realworldqa": ("image", "question", "answer"),
    "ai2d": ("image", "question", "options", "answer"),
    "seedbench": (
        "image", "question", "choice_a", "choice_b", "choice_c", "choice_d", "answer", "data_type",
        "question_id",
    ),
}  # fmt: skip
"""Columns of the real data sets that each image task reads."""
IMAGE_COLUMNS = ("id", "image")
"""Columns of a file of images to which documents refer by id."""


@dataclass(frozen=True)
class LocalDocuments:
    """The splits of a user's files, their source, and the scored rows without a label.

    In the data, the rows `unlabelled` have a valid but meaningless label.
    """

    splits: datasets.DatasetDict
    source: DocumentSource
    unlabelled: tuple[int, ...] = ()


@dataclass(frozen=True)
class RowUse:
    """The part of a task's files that a run reads.

    The first `scored` rows (None: all) of `split` are scored. All other splits are read too if the
    prompts contain few-shot `examples`. `allow_missing` is the share of rows that may have no
    label.
    """

    split: str
    scored: int | None = None
    examples: bool = False
    allow_missing: float = 0.0


def load_local_rows(task: str, path: str, use: RowUse) -> LocalDocuments:
    """Read a file as the scored split, or a folder's files as one split each.

    Every row of these files is parsed and must have the task's columns. Values and label are
    checked only for rows that the run uses, and only these are returned.

    Raises:
        UserError: the path does not exist, a file cannot be read, a column is missing, or a row
            has no answer.
    """
    key = f"benchmark.data.{task}={path}"
    files = _files_by_split(existing_path(path, key), key, use.split)
    read = {name: file for name, file in files.items() if use.examples or name == use.split}
    splits: dict[str, datasets.Dataset] = {}
    unlabelled: list[int] = []
    for name, file in read.items():
        # Few-shot examples are drawn from all rows, and all of them need a correct label.
        kept, allowed = (None, 0.0) if use.examples else (use.scored, use.allow_missing)
        rows, unlabelled = _checked_rows(task, file, key, kept, allowed)
        splits[name] = _as_dataset(rows, f"{key}: {file.name}")
    # All files of the folder are part of the data's identity, whether they are read or not.
    source = file_source(list(files.values()))
    # The rows are those of the scored split: with examples, no row may be unlabelled.
    return LocalDocuments(datasets.DatasetDict(splits), source, tuple(unlabelled))


def _files_by_split(path: Path, key: str, split: str) -> dict[str, Path]:
    if path.is_file():
        return {split: path}
    files: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        # The split of `test.jsonl.gz` is `test`.
        name = file.name.partition(".")[0]
        if file.suffix not in SUFFIXES or not file.is_file():
            continue
        if name in files:
            raise UserError(
                f"{key}: {files[name].name} and {file.name} are both the split {name}; remove one"
            )
        files[name] = file
    if split not in files:
        raise UserError(f"{key}: the folder must contain {split}.parquet, the split that is scored")
    return files


HELLASWAG_ENDINGS = 4
SHOWN_CHARS = 60
"""Maximum number of characters of an invalid value in a message."""
Label: TypeAlias = tuple[str, Callable[[DataRow], Iterable[object]]]
"""The column of a task's correct answer, and a function from a row to the values it may have."""


def _binary_labels(row: DataRow) -> Iterable[object]:
    return (0, 1)


def _option_letters(row: DataRow) -> Iterable[object]:
    return cast("Iterable[object]", row["choices"]["label"])


def _maths_letters(row: DataRow) -> Iterable[object]:
    return "abcde"[: _count_options(row["options"])]


def _count_options(text: str) -> int:
    """Return the number of options that the harness finds in `a ) 1 , b ) 2 , ...` (MathQA)."""
    return len(re.findall(r"[abcd] \) .*?, |e \) .*?$", text))


LABELS: dict[str, Label] = {
    "boolq": ("label", _binary_labels),
    "rte": ("label", _binary_labels),
    "piqa": ("label", _binary_labels),
    "arc_easy": ("answerKey", _option_letters),
    "arc_challenge": ("answerKey", _option_letters),
    "openbookqa": ("answerKey", _option_letters),
    "winogrande": ("answer", lambda row: ("1", "2")),
    # A string in the original data set and an integer in some copies; the harness accepts both.
    "hellaswag": ("label", lambda row: [*range(4), *map(str, range(4))]),
    "mathqa": ("correct", _maths_letters),
}
LABEL_COLUMNS = frozenset(column for column, _ in LABELS.values())


def _checked_rows(
    task: str, path: Path, key: str, kept: int | None, allow_missing: float
) -> tuple[list[DataRow], list[int]]:
    """Read a file to its end; return the first `kept` rows, and the indices of unlabelled ones.

    In public test splits the label is -1 or an empty string. The harness would score such rows as
    wrong for every model.
    """
    columns = TEXT_COLUMNS.get(task, ())
    file = RowFile(path, key, columns, kept)
    rows: list[DataRow] = []
    unlabelled: list[int] = []
    first_fault: UserError | None = None
    for row in file:
        if columns:
            _refuse_misfit(row, file, columns)
        if task in LABELS:
            column, allowed = LABELS[task]
            values = list(allowed(row))
            label = _canonical_label(row[column], values)
            if label is None:
                first_fault = first_fault or _unlabelled_error(file, column, row, values)
                if not allow_missing:
                    raise first_fault
                unlabelled.append(len(rows))
            # The harness needs a valid label in every row; scores of unlabelled rows are discarded.
            row[column] = values[0] if label is None else label
        rows.append(row)
    if first_fault and not TaskAnswers(
        len(rows), {str(row): NO_LABEL for row in unlabelled}
    ).suffice(allow_missing):
        raise UserError(f"{first_fault} ({len(unlabelled)} of {len(rows)} rows have none)")
    return rows, unlabelled


def _refuse_misfit(row: DataRow, file: RowFile, columns: Sequence[str]) -> None:
    """Raise UserError if a value of a row does not have the form that the task's prompt needs."""
    for column in columns:
        fits, needed = COLUMN_FORMS.get(column, TEXT_FORM)
        if column not in LABEL_COLUMNS and not fits(row[column]):
            raise file.fault(f"has {column}={_shortened(row[column])}; this task needs {needed}")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_texts(value: object) -> bool:
    # At least two, because of a single answer a model always chooses the right one.
    return (
        isinstance(value, list)
        and len(value) > 1
        and all(isinstance(text, str) and text.strip() for text in value)
    )


def _are_choices(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    texts, labels = value.get("text"), value.get("label")
    # Without duplicate labels, which would be ambiguous.
    return (
        _are_texts(texts)
        and _are_texts(labels)
        and len(texts or ()) == len(labels or ()) == len(set(labels or ()))
    )


def _are_endings(value: object) -> bool:
    return isinstance(value, list) and _are_texts(value) and len(value) == HELLASWAG_ENDINGS


def _are_lettered(value: object) -> bool:
    return isinstance(value, str) and _count_options(value) > 1


def _has_blank(value: object) -> bool:
    return isinstance(value, str) and "_" in value


TEXT_FORM = (_is_text, "a string")
COLUMN_FORMS = {
    "choices": (
        _are_choices,
        "an object of 'text' and 'label', lists of two or more strings each, of one length, none "
        "of them empty, no label twice",
    ),
    "endings": (_are_endings, f"a list of {HELLASWAG_ENDINGS} strings, none of them empty"),
    "sentence": (_has_blank, "a string with _ in place of the word that is asked for"),
    "options": (_are_lettered, "a string such as 'a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5'"),
}
"""Columns that are not plain text: a check of their values, and a description of valid ones."""


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def _canonical_label(value: object, values: Sequence[object]) -> object | None:
    """Return the label among `values` that a value denotes, or None.

    Tables written by other programs may have 1 as 1.0, true, "1" or " 1".
    """
    if isinstance(value, str):
        value = value.strip()
    elif isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    if value in values:
        return value
    forms: list[object] = [str(value)]
    if isinstance(value, str) and value.removeprefix("-").isdecimal():
        forms.append(int(value))
    return next((form for form in forms if form in values), None)


def _unlabelled_error(
    file: RowFile, column: str, row: DataRow, values: Sequence[object]
) -> UserError:
    return file.fault(
        f"has {column}={_shortened(row[column])}, which is not an answer; this task needs one of "
        f"{', '.join(map(repr, values))}: use a split with answers"
    )


def _as_dataset(rows: list[DataRow], where: str) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_list(rows)
    # Such as mixed types, half of a surrogate pair, or an integer of more than 64 bits.
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise UserError(
            f"{where}: {_table_fault(rows) or str(error).partition(chr(10))[0]}"
        ) from error


def _table_fault(rows: list[DataRow]) -> str | None:
    """Return a sentence about the first row that does not fit into a table, or None."""
    kinds: dict[str, tuple[str, int]] = {}
    for index, row in enumerate(rows):
        try:
            pyarrow.Table.from_pylist([row])
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
            reason = str(error).partition("\n")[0]
            return f"row {index} has a value that cannot be stored in a table: {reason}"
        for column, value in row.items():
            if value is None:
                continue
            kind = JSON_KINDS.get(type(value), "a string")
            first, before = kinds.setdefault(column, (kind, index))
            if kind != first:
                return f"row {index} has {kind} in column {column!r}, row {before} has {first}"
    return None


JSON_KINDS = {
    dict: "an object",
    list: "a list",
    int: "a number",
    float: "a number",
    bool: "true or false",
}
"""Names of JSON's types; everything else is a string."""


def read_image_rows(
    name: str, path: str, part: str | None, split: str
) -> tuple[datasets.Dataset, DocumentSource]:
    """Read one file, or the files of a folder for `split` (or named after `part`).

    Raises:
        UserError: the path does not exist, a file cannot be read, or a column is missing.
    """
    key = f"benchmark.data.{name}={path}"
    files = _parquet_files(existing_path(path, key), key, part, split)
    rows = _read_parquet_table(files, key)
    _require_columns(rows, IMAGE_TASK_COLUMNS.get(name, ()), key)
    return rows, file_source(files)


def read_separate_images(
    name: str, path: str, part: str, split: str
) -> tuple[datasets.Dataset, DocumentSource]:
    """Read the images to which documents refer by id, from the folder of the documents.

    Raises:
        UserError: the path is not a folder, a file cannot be read, or a column is missing.
    """
    key = f"benchmark.data.{name}={path}"
    folder = existing_path(path, key)
    if folder.is_file():
        raise UserError(
            f"{key}: the rows have no column 'image'; give a folder that contains {part}.parquet"
        )
    files = _parquet_files(folder, key, part, split)
    rows = _read_parquet_table(files, key)
    _require_columns(rows, IMAGE_COLUMNS, f"{key}: {files[0].name}")
    return rows, file_source(files)


def _parquet_files(path: Path, key: str, part: str | None, split: str) -> list[Path]:
    """Return a file, or a folder's files: PART.parquet, PART/SPLIT*.parquet or SPLIT*.parquet."""
    if path.is_file():
        return [path]
    patterns = [f"{split}.parquet", f"{split}-*.parquet"]
    if part is not None:
        patterns = [f"{part}.parquet", *(f"{part}/{each}" for each in patterns), *patterns]
    # The first pattern that matches is used. A folder may contain several configurations of a data
    # set, so the more specific names come first.
    for pattern in patterns:
        files = sorted(path.glob(pattern))
        if files:
            return files
    expected = f"{part}.parquet or {split}.parquet" if part else f"{split}.parquet"
    raise UserError(f"{key}: the folder must contain {expected}")


def _read_parquet_table(files: list[Path], key: str) -> datasets.Dataset:
    """Read parquet; images are decoded on access."""
    try:
        tables = [parquet.read_table(file, memory_map=True) for file in files]
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{key}: {files[0].name} cannot be read as parquet: {reason}") from error
    # Wraps the memory-mapped tables; `load_dataset("parquet")` would copy them into its own cache.
    rows = datasets.Dataset(pyarrow.concat_tables(tables))
    if not len(rows):
        raise UserError(f"{key}: {files[0].name} has no rows")
    for column, kind in _stored_images(rows).items():
        try:
            rows = rows.cast_column(column, kind)
        except (TypeError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(
                f"{key}: column {column!r} must hold an image's bytes and path, as hub data sets do"
            ) from error
    return rows


def _stored_images(rows: datasets.Dataset) -> dict[str, datasets.Image | datasets.List]:
    """Return the columns that contain image files, with the feature types to decode them."""
    found: dict[str, datasets.Image | datasets.List] = {}
    for name, kind in rows.features.items():
        inner = kind.feature if isinstance(kind, datasets.List) else kind
        if isinstance(inner, datasets.Image):
            continue
        if (isinstance(inner, dict) and set(inner) == {"bytes", "path"}) or name == "image":
            is_list = isinstance(kind, datasets.List)
            found[name] = datasets.List(datasets.Image()) if is_list else datasets.Image()
    return found


def _require_columns(rows: datasets.Dataset, columns: tuple[str, ...], where: str) -> None:
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise UserError(
            f"{where} has no column {missing[0]!r}; this task needs {', '.join(columns)}"
        )
