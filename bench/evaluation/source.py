"""Where documents came from, as a record keeps it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

Origin = Literal["hub", "embedded", "file", "harness"]


@dataclass(frozen=True)
class Source:
    """One data set: its origin, where it lies there, the revision, a fingerprint of its content.

    `revision` is the hub's commit; None for embedded data and local files, whose fingerprint is
    a hash of the content itself. Origin `harness` is data that a task's own code makes.
    """

    origin: Origin
    location: str
    revision: str | None
    fingerprint: str


def file_source(files: list[Path]) -> Source:
    """Describe local files; the fingerprint is the SHA-256 over their bytes, in order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    location = files[0] if len(files) == 1 else files[0].parent
    return Source("file", str(location), None, digest.hexdigest())


def hub_source(location: str, revision: str | None, loaded: str) -> Source:
    """Describe a hub data set; `loaded` identifies its content where no commit is known."""
    return Source("hub", location, revision, f"{location}@{revision or loaded}")
