"""SHA-256 fingerprint of weight files, stored with every result.

A file is read once: its digest is cached in the user's cache folder under the file's path, size and
modification time. Files of the Hugging Face cache are already named by their SHA-256.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

SHA256 = re.compile(r"[0-9a-f]{64}")


def fingerprint(files: Iterable[Path]) -> str:
    """Hash the names and digests of files, independent of their order."""
    lines = sorted(f"{file.name} {digest(file)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digest(file: Path) -> str:
    """Return the SHA-256 of a file's content, from its blob name or the cache if known there."""
    real = file.resolve()
    # The hub names LFS blobs by their SHA-256. Small files have a git SHA-1 of 40 digits instead,
    # which the pattern rejects.
    if real.parent.name == "blobs" and SHA256.fullmatch(real.name):
        return real.name
    # mtime in nanoseconds and size detect a rewritten file. A file replaced within one tick of the
    # clock by one of equal size would go unnoticed; hashing tens of gigabytes per run is the
    # alternative.
    state = real.stat()
    key = hashlib.sha256(f"{real}|{state.st_size}|{state.st_mtime_ns}".encode()).hexdigest()
    remembered = _cache() / key
    try:
        known = remembered.read_text()
        # A cache file that was truncated by a full disk is treated as absent.
        if SHA256.fullmatch(known):
            return known
    except OSError:
        pass
    with real.open("rb") as stream:
        computed = hashlib.file_digest(stream, "sha256").hexdigest()
    _remember(remembered, computed)
    return computed


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "slimbench" / "digests"


def _remember(place: Path, value: str) -> None:
    """Write a digest atomically; without a writable cache it is recomputed next time."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # Jobs of a sweep share the cache: rename is atomic, so that a reader sees the whole digest
        # or none.
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False) as stream:
            stream.write(value)
        Path(stream.name).replace(place)
    except OSError:
        pass
