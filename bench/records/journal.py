"""Append-only file with the results of an unfinished run, which survives a kill at any time.

Each line is an entry: the CRC-32 of its JSON in hex, a blank, the JSON. The first line names format
and identity. A torn last line is cut off, a damaged line is skipped, and a file of a different
format or identity is moved aside. None of these is an error; each is reported in `notes`.

An entry has reached the kernel when `append` returns, so it survives a kill of the process. The
file is synced to disk at most once per second and at the end; a power cut loses only the entries
since then.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.records.files import read_regular_file

FORMAT = 1
MAX_BYTES = 2**33
"""Maximum size of a journal, which is read whole; a million long answers take 1 % of it."""
SYNC_SECONDS = 1.0


class Journal:
    """Entries left by an earlier, killed process, and a file to append new ones to."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.entries: list[Any] = []
        self.notes: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._end = self._read(identity) if os.path.lexists(path) else 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        # Truncate an incomplete last line, to which the next entry would otherwise be appended.
        os.ftruncate(self._file, self._end)
        self._synced = 0.0
        if self._end == 0:
            self.append({"format": FORMAT, "identity": identity})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        # The last entries may not be synced yet. A failure of the sync must not hide the error that
        # ended the block.
        with suppress(OSError):
            os.fsync(self._file)
        os.close(self._file)

    def append(self, entry: object) -> None:
        """Append one entry, whole or not at all.

        Raises:
            OSError: the disk is full; earlier entries are intact.
        """
        line = _encode_entry(entry)
        try:
            # Written at a known offset instead of in append mode, so that a line that does not fit
            # on the disk can be truncated. Only a kill can leave an incomplete last line.
            written = 0
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._end + written)
            if time.monotonic() - self._synced > SYNC_SECONDS:
                # Only a power cut makes fsync necessary. Once per second, because one per entry
                # would take longer than computing a short response.
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError:
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(line)

    def _read(self, identity: str) -> int:
        """Read an existing file into `entries`; return the end of its last complete line."""
        try:
            content = read_regular_file(self.path, MAX_BYTES)
        except ValueError as error:
            self._move_aside(str(error))
            return 0
        end = content.rfind(b"\n") + 1
        lines = content[:end].split(b"\n")[:-1]
        reason = (
            _mismatch_reason(lines[0], identity) if lines else "it is cut off in its first line"
        )
        if reason:
            self._move_aside(reason)
            return 0
        # Entries are independent, so only the response of a damaged line is computed again.
        for number, line in enumerate(lines[1:], 2):
            try:
                self.entries.append(_decode_entry(line))
            except ValueError as error:
                self.notes.append(f"{self.path}: line {number} {error}; its entry is redone")
        return end

    def _move_aside(self, reason: str) -> None:
        """Rename the file instead of deleting it."""
        names = (self.path.with_name(f"{self.path.name}.aside{n}") for n in count(1))
        free = next(name for name in names if not name.exists())
        self.path.rename(free)
        self.notes.append(f"{self.path}: {reason}; it was moved aside to {free.name}")


def _encode_entry(entry: object) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def _decode_entry(line: bytes) -> Any:
    """Return the entry of a line; a `ValueError` says what is wrong with it."""
    digits, _, text = line.partition(b" ")
    if digits != b"%08x" % zlib.crc32(text):
        raise ValueError("is damaged")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deep") from None


def _mismatch_reason(line: bytes, identity: str) -> str | None:
    """Return why the journal header is incompatible, or None."""
    try:
        header = _decode_entry(line)
    except ValueError as error:
        return f"its first line {error}"
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else None
        return f"its format is {found}, this program reads {FORMAT}"
    if header.get("identity") != identity:
        return "it belongs to a network with different weights"
    return None
