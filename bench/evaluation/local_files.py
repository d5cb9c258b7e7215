"""A user's own files in place of a task's data set, for both harnesses."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias, cast

import datasets
import pyarrow
from pyarrow import parquet

from bench.errors import UserError
from bench.evaluation.harness import DocumentSource, file_source

DataRow: TypeAlias = dict[str, Any]
"""One document: values by column, as JSON or parquet gives them."""
SUFFIXES = (".parquet", ".jsonl", ".json", ".gz")
"""Supported formats: parquet, JSON Lines, a JSON list, and the latter two compressed."""
UNREADABLE = (OSError, ValueError, EOFError, zlib.error)
"""Errors of readers on a damaged file.

ArrowInvalid, JSONDecodeError and UnicodeDecodeError are ValueErrors, BadGzipFile is an OSError;
EOFError and zlib.error are raised on a `.gz` file that is cut off or damaged inside.
"""
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
}  # fmt: skip
"""Columns of the real data sets that each image task reads."""
IMAGE_COLUMNS = ("id", "image")
"""Columns of a file with the images of documents that only name them."""


def load_local_rows(
    task: str, path: str, split: str
) -> tuple[datasets.DatasetDict, DocumentSource]:
    """Read a file as the split `split`, or a folder's files as one split each.

    Raises:
        UserError: the path does not exist, a file cannot be read, a column is missing, or a row
            has no answer.
    """
    key = f"benchmark.data.{task}={path}"
    files = _files_by_split(_existing_path(path, key), key, split)
    splits = {name: read_rows(file, key) for name, file in files.items()}
    for name, rows in splits.items():
        where = f"{key}: {files[name].name}"
        _check_columns(rows, TEXT_COLUMNS.get(task, ()), where)
        _check_labels(task, rows, where)
    data = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    return datasets.DatasetDict(data), file_source(list(files.values()))


def _existing_path(path: str, key: str) -> Path:
    """Return the path that the setting `key` names.

    Raises:
        UserError: there is nothing at it.
    """
    existing = Path(path).expanduser()
    if not existing.exists():
        raise UserError(f"{key}: no such file or folder")
    return existing


def _files_by_split(path: Path, key: str, split: str) -> dict[str, Path]:
    if path.is_file():
        return {split: path}
    files = {
        # Up to the first dot: `test.jsonl.gz` is the split `test`.
        file.name.partition(".")[0]: file
        for file in sorted(path.iterdir())
        if file.suffix in SUFFIXES
    }
    if split not in files:
        raise UserError(f"{key}: the folder must contain {split}.parquet, the split that is scored")
    return files


def read_rows(file: Path, key: str) -> list[DataRow]:
    """Read the rows of a table; `key` names the user's setting in error messages.

    Raises:
        UserError: the format is not supported, the file cannot be read or has no rows.
    """
    if file.suffix not in SUFFIXES:
        raise UserError(f"{key}: {file.name} must be one of {', '.join(SUFFIXES)}")
    try:
        rows = _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file)
    except UNREADABLE as error:
        raise _unreadable(key, file, file.suffix, error) from error
    if not rows:
        raise UserError(f"{key}: {file.name} has no rows")
    return rows


def _unreadable(key: str, file: Path, kind: str, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0]
    return UserError(f"{key}: {file.name} cannot be read as {kind}: {reason}")


def _parquet_rows(file: Path) -> list[DataRow]:
    rows: list[DataRow] = parquet.read_table(file).to_pylist()
    return rows


def _json_rows(file: Path) -> list[DataRow]:
    content = file.read_bytes()
    text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("every row must be an object")
    return list(rows)


Label: TypeAlias = tuple[str, Callable[[DataRow], Iterable[object]]]
"""The column of a task's correct answer, and a function from a row to the values it may have."""


def _binary_labels(row: DataRow) -> Iterable[object]:
    return (0, 1)


def _option_letters(row: DataRow) -> Iterable[object]:
    return cast("Iterable[object]", row["choices"]["label"])


LABELS: dict[str, Label] = {
    "boolq": ("label", _binary_labels),
    "rte": ("label", _binary_labels),
    "piqa": ("label", _binary_labels),
    "arc_easy": ("answerKey", _option_letters),
    "arc_challenge": ("answerKey", _option_letters),
    "openbookqa": ("answerKey", _option_letters),
    "winogrande": ("answer", lambda row: ("1", "2")),
    # A string in the real data set, an integer in some copies of it; the harness reads both.
    "hellaswag": ("label", lambda row: [*range(4), *map(str, range(4))]),
    "mathqa": ("correct", lambda row: "abcde"),
}


def _check_labels(task: str, rows: list[DataRow], where: str) -> None:
    """Raise UserError unless every row holds an answer that the task can score."""
    if task not in LABELS:
        return
    column, allowed = LABELS[task]
    for index, row in enumerate(rows):
        value, values = row[column], list(allowed(row))
        # The files of public test splits hold -1 or an empty string. The harness would score such
        # a row as wrong for every model, and report an accuracy of 0.
        label = value.strip() if isinstance(value, str) else value
        if label not in values:
            raise UserError(
                f"{where}: row {index} has {column}={value!r}, which is no answer; this task needs "
                f"one of {', '.join(map(repr, values))}. Give a split that holds the answers"
            )


def _check_columns(rows: list[DataRow], columns: tuple[str, ...], where: str) -> None:
    for index, row in enumerate(rows):
        # None counts as missing: parquet and a list of dictionaries fill absent values with it, and
        # a prompt template would render it as the word None.
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise UserError(
                f"{where} has no column {missing[0]!r} (row {index}); "
                f"this task needs {', '.join(columns)}"
            )


def read_image_rows(
    name: str, path: str, part: str | None, split: str
) -> tuple[datasets.Dataset, DocumentSource]:
    """Read one file, or the files of a folder for `split` (or named after `part`).

    Raises:
        UserError: the path does not exist, a file cannot be read, or a column is missing.
    """
    key = f"benchmark.data.{name}={path}"
    files = _parquet_files(_existing_path(path, key), key, part, split)
    rows = _read_parquet_table(files, key)
    _require_columns(rows, IMAGE_TASK_COLUMNS.get(name, ()), key)
    return rows, file_source(files)


def read_separate_images(
    name: str, path: str, part: str, split: str
) -> tuple[datasets.Dataset, DocumentSource]:
    """Read the images of documents that only name them, from a folder that holds both.

    Raises:
        UserError: the path is no folder, a file cannot be read, or a column is missing.
    """
    key = f"benchmark.data.{name}={path}"
    folder = _existing_path(path, key)
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
    # The first pattern that matches wins: a folder may hold several configurations of a data set,
    # and the more specific names come first.
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
        raise _unreadable(key, files[0], "parquet", error) from error
    # Wraps the memory-mapped tables; `load_dataset("parquet")` would copy them into its own cache.
    rows = datasets.Dataset(pyarrow.concat_tables(tables))
    if not len(rows):
        raise UserError(f"{key}: {files[0].name} has no rows")
    if "image" in rows.column_names and not isinstance(rows.features["image"], datasets.Image):
        try:
            rows = rows.cast_column("image", datasets.Image())
        except (TypeError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(
                f"{key}: column 'image' must hold an image's bytes and path, as hub data sets do"
            ) from error
    return rows


def _require_columns(rows: datasets.Dataset, columns: tuple[str, ...], where: str) -> None:
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise UserError(
            f"{where} has no column {missing[0]!r}; this task needs {', '.join(columns)}"
        )
