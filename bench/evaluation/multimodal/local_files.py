"""A user's own parquet files in place of a task's data set: memory-mapped and checked."""

from __future__ import annotations

from pathlib import Path

import datasets
import pyarrow

from bench.errors import UserError
from bench.evaluation.source import Source, file_source

COLUMNS = {
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
"""Columns of the real data sets that each task reads."""

IMAGE_COLUMNS = ("id", "image")
"""Columns of a file with the images of documents that only name them."""


def read(name: str, path: str, part: str | None, split: str) -> tuple[datasets.Dataset, Source]:
    """Read one file, or the files of a folder for `split` (or named after `part`).

    Raises:
        UserError: the path does not exist, a file cannot be read, or a column is missing.
    """
    key = f"benchmark.data.{name}={path}"
    files = _files(Path(path).expanduser(), key, part, split)
    rows = _table(files, key)
    _check(rows, COLUMNS.get(name, ()), key)
    return rows, file_source(files)


def read_images(name: str, path: str, part: str, split: str) -> tuple[datasets.Dataset, Source]:
    """Read the images of documents that only name them, from a folder that holds both.

    Raises:
        UserError: the path is no folder, a file cannot be read, or a column is missing.
    """
    key = f"benchmark.data.{name}={path}"
    folder = Path(path).expanduser()
    if folder.is_file():
        raise UserError(
            f"{key}: the rows have no column 'image'; give a folder that contains {part}.parquet"
        )
    files = _files(folder, key, part, split)
    rows = _table(files, key)
    _check(rows, IMAGE_COLUMNS, f"{key}: {files[0].name}")
    return rows, file_source(files)


def _files(path: Path, key: str, part: str | None, split: str) -> list[Path]:
    """Return a file, or a folder's files: PART.parquet, PART/SPLIT*.parquet or SPLIT*.parquet."""
    if not path.exists():
        raise UserError(f"{key}: no such file or folder")
    if path.is_file():
        return [path]
    patterns = [f"{split}.parquet", f"{split}-*.parquet"]
    if part is not None:
        patterns = [f"{part}.parquet", *(f"{part}/{each}" for each in patterns), *patterns]
    # The first pattern that matches wins: a folder may hold several configurations of a data set,
    # and the more specific names come first.
    for pattern in patterns:
        found = sorted(path.glob(pattern))
        if found:
            return found
    wanted = f"{part}.parquet or {split}.parquet" if part else f"{split}.parquet"
    raise UserError(f"{key}: the folder must contain {wanted}")


def _table(files: list[Path], key: str) -> datasets.Dataset:
    """Read parquet; images are decoded on access."""
    try:
        tables = [pyarrow.parquet.read_table(file, memory_map=True) for file in files]
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{key}: {files[0].name} cannot be read as parquet: {reason}") from error
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


def _check(rows: datasets.Dataset, columns: tuple[str, ...], where: str) -> None:
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise UserError(
            f"{where} has no column {missing[0]!r}; this task needs {', '.join(columns)}"
        )
