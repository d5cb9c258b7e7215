"""A user's own files in place of a task's data set: read and checked."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
from pyarrow import parquet

from bench.errors import UserError
from bench.evaluation.source import Source, file_source

SUFFIXES = (".parquet", ".jsonl", ".json", ".gz")
"""Supported formats: parquet, JSON Lines, a JSON list, and the latter two compressed."""

COLUMNS = {
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
"""Columns of the real data sets that each task reads."""


def load(task: str, path: str, split: str) -> tuple[datasets.DatasetDict, Source]:
    """Read a file as the split `split`, or a folder's files as one split each.

    Raises:
        UserError: the path does not exist, a file cannot be read, or a column is missing.
    """
    key = f"benchmark.data.{task}={path}"
    files = _files(Path(path).expanduser(), key, split)
    splits = {name: read_rows(file, key) for name, file in files.items()}
    for name, rows in splits.items():
        _check_columns(rows, COLUMNS.get(task, ()), f"{key}: {files[name].name}")
    data = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    return datasets.DatasetDict(data), file_source(list(files.values()))


def _files(path: Path, key: str, split: str) -> dict[str, Path]:
    if not path.exists():
        raise UserError(f"{key}: no such file or folder")
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


def read_rows(file: Path, key: str) -> list[dict[str, Any]]:
    """Read the rows of a table; `key` names the user's setting in error messages.

    Raises:
        UserError: the format is not supported, the file cannot be read or has no rows.
    """
    if file.suffix not in SUFFIXES:
        raise UserError(f"{key}: {file.name} must be one of {', '.join(SUFFIXES)}")
    try:
        # ArrowInvalid, JSONDecodeError and UnicodeDecodeError are ValueErrors; BadGzipFile is an
        # OSError.
        rows = _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{key}: {file.name} cannot be read as {file.suffix}: {reason}") from error
    if not rows:
        raise UserError(f"{key}: {file.name} has no rows")
    return rows


def _parquet_rows(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
    return rows


def _json_rows(file: Path) -> list[dict[str, Any]]:
    content = file.read_bytes()
    text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("every row must be an object")
    return list(rows)


def _check_columns(rows: list[dict[str, Any]], columns: tuple[str, ...], where: str) -> None:
    for number, row in enumerate(rows):
        # None counts as missing: parquet and a list of dictionaries fill absent values with it, and
        # a prompt template would render it as the word None.
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise UserError(
                f"{where} has no column {missing[0]!r} (row {number}); "
                f"this task needs {', '.join(columns)}"
            )
