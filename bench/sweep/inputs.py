"""All that decides a sweep's results, cheap to compare: no model library is imported.

A run's own id is the judge of whether it must be run; this only answers sooner, and says no when
in doubt. Files count by their size and time of last change.
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
    """Files and packages that decide the results, and a hash of how they were."""

    files: list[str]
    packages: list[str]
    state: str

    @classmethod
    def of(cls, files: Iterable[Path], packages: Iterable[str]) -> Inputs:
        """Note how things are now: data and model files, and the packages with the code."""
        named = sorted({str(file.absolute()) for file in files})
        code = sorted({"bench", "conf", *packages})
        return cls(named, code, _state(named, code))

    def stand(self) -> bool:
        """Whether nothing has changed since."""
        return _state(self.files, self.packages) == self.state


def _state(files: list[str], packages: list[str]) -> str:
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
    """Yield path, size and time of last change of every file, in a fixed order."""
    for name in files:
        path = Path(name)
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            yield _stamp(file)
    for package in packages:
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
