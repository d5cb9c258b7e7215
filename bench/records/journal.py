"""What an unfinished run has so far: an append-only file that survives a kill at any moment.

A line is an entry: the CRC-32 of its JSON in hex, a blank, the JSON. The first one names format
and identity. A torn last line is cut off, a damaged one is passed over, and a file of another
format or identity is set aside under another name; each is said in `notes` and none is an error.

An entry is with the kernel as soon as `append` returns, which is what a killed process needs, and
on the disk a second later at most, which is what a power cut needs.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FORMAT = 1
SYNC_SECONDS = 1.0


class Journal:
    """The entries that an earlier, killed process left, and a place for those that follow."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.entries: list[Any] = []
        self.notes: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._end = self._read(identity) if path.exists() else 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
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
        os.close(self._file)

    def append(self, entry: Any) -> None:
        """Add one entry, whole or not at all.

        Raises:
            OSError: there is no room for it; what was written before stays.
        """
        line = _line(entry)
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._end + written)
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError:
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(line)

    def _read(self, identity: str) -> int:
        """Take in a file that is there; return where its last whole line ends."""
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        lines = content[:end].split(b"\n")[:-1]
        reason = _unfit(lines[0], identity) if lines else "it is cut off in its first line"
        if reason:
            self._set_aside(reason)
            return 0
        for number, line in enumerate(lines[1:], 2):
            try:
                self.entries.append(_parse(line))
            except ValueError as error:
                self.notes.append(f"{self.path}: line {number} {error}; what it held is done again")
        return end

    def _set_aside(self, reason: str) -> None:
        """Give the file another name, so that nothing is lost and nothing wrong is read."""
        names = (self.path.with_name(f"{self.path.name}.aside{n}") for n in count(1))
        free = next(name for name in names if not name.exists())
        self.path.rename(free)
        self.notes.append(f"{self.path}: {reason}; it is set aside as {free.name}")


def _line(entry: Any) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> Any:
    """Return an entry, or say in a `ValueError` what is wrong with its line."""
    digits, _, text = line.partition(b" ")
    if digits != b"%08x" % zlib.crc32(text):
        raise ValueError("is damaged")
    return json.loads(text)


def _unfit(line: bytes, identity: str) -> str | None:
    """Return why a file with this first line cannot be gone on with."""
    try:
        header = _parse(line)
    except ValueError as error:
        return f"its first line {error}"
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else None
        return f"its format is {found}, this program reads {FORMAT}"
    if header.get("identity") != identity:
        return "it was left by a network with other weights"
    return None
