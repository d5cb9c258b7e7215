"""Fingerprint of everything that decides a sweep's results; importing it loads no model library.

Whether a run must be executed is decided by its id. The fingerprint only answers sooner, without
composing the runs, and counts as changed when in doubt. Files enter by size and modification time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("slimbench", "torch", "transformers", "lm-eval", "lmms-eval", "hydra-core")
PROGRAM = {".py", ".yaml", ".json", ".safetensors", ".jinja", ".gz", ".txt"}


@dataclass(frozen=True)
class Inputs:
    """Files and packages that decide the results, and a hash of their state."""

    files: list[str]
    packages: list[str]
    state: str

    @classmethod
    def of(cls, files: Iterable[Path], packages: Iterable[str]) -> Inputs:
        """Record the current state of data and model files and of the packages with the code."""
        # Absolute, because the sweep may be resumed from another folder.
        named = sorted({str(file.absolute()) for file in files})
        code = sorted({"bench", "conf", *packages})
        return cls(named, code, _state(named, code))

    def stand(self) -> bool:
        """Whether nothing has changed since the state was recorded."""
        return _state(self.files, self.packages) == self.state


def _state(files: list[str], packages: list[str]) -> str:
    # The host is part of it: modification times compare within one machine only.
    digest = hashlib.sha256(f"{platform.node()} {platform.python_version()}\n".encode())
    for line in (*_versions(), *_stamps(files, packages)):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _versions() -> Iterator[str]:
    for name in LIBRARIES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"{name} not installed"


def _stamps(files: list[str], packages: list[str]) -> Iterator[str]:
    """Yield path, size and modification time of every file, in a fixed order."""
    for name in files:
        path = Path(name)
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            yield _stamp(file)
    for package in packages:
        # `find_spec` locates a top-level package without importing it.
        found = importlib.util.find_spec(package)
        for root in (found.submodule_search_locations or []) if found else []:
            for file in sorted(Path(root).rglob("*")):
                if file.suffix in PROGRAM:
                    yield _stamp(file)


def _stamp(file: Path) -> str:
    try:
        seen = file.stat()
    except OSError:
        return f"{file} missing"
    return str(file) if file.is_dir() else f"{file} {seen.st_size} {seen.st_mtime_ns}"
