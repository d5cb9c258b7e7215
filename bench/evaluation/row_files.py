"""Read the rows of JSON Lines, JSON and parquet files one by one.

Files of any length are read in a bounded amount of memory.
"""

from __future__ import annotations

import codecs
import gzip
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import pyarrow
from pyarrow import parquet

from bench.errors import UserError

DataRow: TypeAlias = dict[str, Any]
"""One document: values by column, as read from JSON or parquet."""
SUFFIXES = (".parquet", ".jsonl", ".json", ".gz")
"""Supported formats: parquet, JSON Lines, a JSON list; the latter two also compressed."""
UNREADABLE = (OSError, ValueError, EOFError, zlib.error, pyarrow.ArrowException, RecursionError)
"""Errors of readers on a damaged file.

JSONDecodeError and UnicodeDecodeError are ValueErrors, BadGzipFile is an OSError. EOFError and
zlib.error are raised for a truncated or damaged `.gz` file, RecursionError for JSON that is nested
a thousand levels deep.
"""
MAX_ROW_BYTES = 1 << 26
"""64 MiB; a longer row is a sign of a file without line ends or with a missing bracket."""
_CHUNK = 1 << 20
_START = 1 << 16
"""Number of bytes within which a JSON list must begin; otherwise the file is JSON Lines."""
_PARQUET_BATCH = 1024
_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder()
_SCAN = cast("Any", _DECODER).scan_once


def existing_path(path: str, key: str) -> Path:
    """Return the file or folder at a path; `key` names the user's setting in messages.

    Raises:
        UserError: there is nothing at the path, or a device or pipe, which may never end.
    """
    try:
        existing = Path(path).expanduser()
        found = existing.exists()
    except (OSError, RuntimeError):  # A name that is too long, or the home of an unknown user.
        found = False
    if not found:
        raise UserError(f"{key}: no such file or folder")
    if not (existing.is_file() or existing.is_dir()):
        raise UserError(f"{key} is neither a file nor a folder")
    return existing


def read_rows(file: Path, key: str) -> list[DataRow]:
    """Read all rows of a table; `key` names the user's setting in messages.

    Raises:
        UserError: the format is not supported, or the file cannot be read or has no rows.
    """
    return list(RowFile(file, key))


class RowFile:
    """Iterates over the rows of a file; `place` names the row that was read last.

    All rows are parsed and must have a value in all `columns`; the first `kept` rows (None: all)
    are yielded. Iterating raises UserError if the file cannot be read, a value is missing, or there
    are no rows.
    """

    def __init__(
        self, file: Path, key: str, columns: Sequence[str] = (), kept: int | None = None
    ) -> None:
        if file.suffix not in SUFFIXES:
            raise UserError(f"{key}: {file.name} must be one of {', '.join(SUFFIXES)}")
        self.file = file
        self._key = key
        self._columns = columns
        self._kept = sys.maxsize if kept is None else kept
        self._row = -1
        self._line: int | None = None

    @property
    def place(self) -> str:
        """The row read last, counted from 0 as in a run's samples, and its line counted from 1."""
        line = "" if self._line is None else f" (line {self._line})"
        return f"row {self._row}{line}"

    def fault(self, reason: str) -> UserError:
        """Build the error for the row that was read last."""
        return UserError(f"{self._key}: {self.file.name}: {self.place} {reason}")

    def __iter__(self) -> Iterator[DataRow]:
        self._row, self._line = -1, None
        with self._errors():
            for row in self._rows():
                self._row += 1
                # None counts as missing: parquet uses it for absent values, and a prompt template
                # would render it as the word None.
                for column in self._columns:
                    if row.get(column) is None:
                        raise self._absent(column)
                if self._row < self._kept:
                    yield row
        if self._row < 0:
            raise UserError(f"{self._key}: {self.file.name} has no rows")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Convert errors of the readers into one sentence, with the line if there are lines."""
        try:
            yield
        except UNREADABLE as error:
            reason = str(error).partition("\n")[0]
            if isinstance(error, RecursionError):
                reason = "it is nested too deeply"
            elif isinstance(error, json.JSONDecodeError):
                # The decoder's position is relative to its input, usually one line.
                reason = f"{error.msg} at column {error.colno}"
            where = "" if self._line is None else f", line {self._line},"
            raise UserError(
                f"{self._key}: {self.file.name}{where} cannot be read as {self.file.suffix}: "
                f"{reason}"
            ) from error

    def _absent(self, column: str) -> UserError:
        return self.fault(f"has no column {column!r}; it needs {', '.join(self._columns)}")

    def _rows(self) -> Iterator[DataRow]:
        if self.file.suffix == ".parquet":
            yield from self._parquet_rows()
            return
        opener = gzip.open if self.file.suffix == ".gz" else open
        with cast("BinaryIO", opener(self.file, "rb")) as stream:
            start = stream.read(_START)
            stream.seek(len(_BOM) if start.startswith(_BOM) else 0)
            is_list = start.removeprefix(_BOM).lstrip().startswith(b"[")
            for row in self._list_rows(stream) if is_list else self._line_rows(stream):
                if not isinstance(row, dict):
                    raise ValueError("every row must be an object")
                yield row

    def _parquet_rows(self) -> Iterator[DataRow]:
        # Without threads, whose read-ahead would keep several row groups in memory.
        batches = parquet.ParquetFile(self.file, memory_map=True).iter_batches(
            _PARQUET_BATCH, use_threads=False
        )
        for batch in batches:
            if self._row + 1 < self._kept:
                yield from cast("list[DataRow]", batch.to_pylist())
                continue
            # Values of a column have one type, so only absent ones must be found. Doing that with
            # Python objects would take a minute for a million rows.
            for column in self._columns:
                values = batch[column]
                if values.null_count:
                    self._row += 1 + values.is_null().to_pylist().index(True)
                    raise self._absent(column)
            self._row += len(batch)

    def _line_rows(self, stream: BinaryIO) -> Iterator[object]:
        """Yield the value of every line that is not blank."""
        self._line = 0
        # Read as bytes, because U+2028, U+0085 and others would end lines of text.
        while line := stream.readline(MAX_ROW_BYTES):
            self._line += 1
            if len(line) == MAX_ROW_BYTES:
                raise ValueError(f"the line is longer than {MAX_ROW_BYTES >> 20} MiB")
            text = line.decode()
            try:
                # Twice as fast as `json.loads`, which is the fallback.
                row, end = _SCAN(text, 0)
            except (StopIteration, ValueError):
                end = 0
            if end and end >= len(text.rstrip(_SPACE)):
                yield row
            elif text.strip(_SPACE):
                yield json.loads(text)

    def _list_rows(self, stream: BinaryIO) -> Iterator[object]:
        """Yield the elements of a JSON list."""
        elements = _JsonList(stream)
        try:
            for row in elements:
                self._line = elements.line
                yield row
        finally:
            self._line = elements.line


class _JsonList:
    """Iterates over a JSON list in chunks; `line` is that of the element read last."""

    def __init__(self, stream: BinaryIO) -> None:
        self.line = 1
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._at = 0
        self._size = _CHUNK

    def __iter__(self) -> Iterator[object]:
        self._next_character()
        self._advance(self._at + 1)  # Skips the opening bracket, which the caller has checked.
        closed = self._next_character() == "]"
        while not closed:
            row = self._element()
            yield row
            character = self._next_character()
            closed = character == "]"
            if character not in ("]", ","):
                raise json.JSONDecodeError("Expecting ',' or ']'", self._text, self._at)
            if not closed:
                self._advance(self._at + 1)
                self._next_character()
        self._advance(self._at + 1)
        if self._next_character():
            raise ValueError("there is text after the end of the list")

    def _element(self) -> object:
        while True:
            try:
                row, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # The element may be incomplete.
                if len(self._text) - self._at > MAX_ROW_BYTES or not self._read():
                    self.line += self._text.count("\n", self._at, error.pos)
                    raise
                continue
            self._size = _CHUNK
            self._advance(end)
            return row

    def _next_character(self) -> str:
        """Skip white space; return the next character, or an empty string at the end."""
        while True:
            at = self._at
            while at < len(self._text) and self._text[at] in _SPACE:
                at += 1
            self._advance(at)
            if at < len(self._text):
                return self._text[at]
            if not self._read():
                return ""

    def _advance(self, at: int) -> None:
        self.line += self._text.count("\n", self._at, at)
        self._at = at

    def _read(self) -> bool:
        """Drop consumed text and append a chunk; return whether there was one."""
        chunk = self._stream.read(self._size)
        self._text = self._text[self._at :] + self._decoder.decode(chunk, final=not chunk)
        self._at = 0
        # Doubled within one element, because parsing it again for every chunk would be quadratic.
        self._size *= 2
        return bool(chunk)
