"""One hash that says which weights a number was made with.

A file is read once: its digest is kept in the user's cache under its path, size and time of last
change. Files of the Hugging Face cache are already named by their SHA-256.
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
    """Return the SHA-256 over the names and digests of files, whatever their order."""
    lines = sorted(f"{file.name} {digest(file)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digest(file: Path) -> str:
    """Return the SHA-256 of a file's content, from its blob name or the cache if they know it."""
    real = file.resolve()
    if real.parent.name == "blobs" and SHA256.fullmatch(real.name):
        return real.name
    state = real.stat()
    key = hashlib.sha256(f"{real}|{state.st_size}|{state.st_mtime_ns}".encode()).hexdigest()
    remembered = _cache() / key
    try:
        known = remembered.read_text()
        if SHA256.fullmatch(known):
            return known
    except OSError:
        pass
    with real.open("rb") as stream:
        computed = hashlib.file_digest(stream, "sha256").hexdigest()
    _remember(remembered, computed)
    return computed


def _cache() -> Path:
    """Return the folder of remembered digests."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "slimbench" / "digests"


def _remember(place: Path, value: str) -> None:
    """Write a digest atomically; without a writable cache it is simply computed again."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False) as stream:
            stream.write(value)
        Path(stream.name).replace(place)
    except OSError:
        pass
