"""Digests of files and of source code, for ids that must not miss a changed byte.

The digest of a large file is remembered in the user's cache folder, so that weights are read once
and not once a run. A remembered digest is used only if nothing about the file has changed: device,
inode, size, modification time and change time. The last is set by the kernel and by nothing else,
so a file that was exchanged under its old size and modification time (tar, rsync, Nix, image
layers) is read again.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import TypeAlias

FileStamp: TypeAlias = tuple[int, int, int, int, int]
"""Device, inode, size, modification and change time of a file: equal until somebody writes it."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
# The coarsest clock of the file systems in use (FAT, old NFS) counts in steps of two seconds.
_CLOCK_STEP_NS = 2 * 10**9


def file_stamp(file: Path) -> FileStamp:
    """Return the state of a file, without reading it."""
    seen = file.stat()
    return seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns


def fingerprint(files: Iterable[Path]) -> str:
    """Hash the names and digests of files, independent of their order."""
    lines = sorted(f"{file.name} {digest(file)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digest(file: Path) -> str:
    """Return the SHA-256 of a file's content, read or remembered."""
    real = file.resolve()
    place = cache_folder("digests") / hashlib.sha256(str(real).encode()).hexdigest()
    began, before = time.time_ns(), file_stamp(real)
    known = _remembered(place, before)
    if known is not None:
        return known
    with real.open("rb") as stream:
        computed = hashlib.file_digest(stream, "sha256").hexdigest()
    # As git does for its index: within one step of the clock, a second write leaves no trace in
    # the times. What was written so shortly before it was read is read again next time.
    at_rest = max(before[-2:]) < began - _CLOCK_STEP_NS
    if at_rest and file_stamp(real) == before:
        _remember(place, before, computed)
    return computed


def cache_folder(name: str) -> Path:
    """Return the folder of what is kept between runs only because it takes time to make."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "slimbench" / name


def _remembered(place: Path, stamp: FileStamp) -> str | None:
    """Return what is remembered of a file in this state; None if nothing is, or nothing legible."""
    try:
        *numbers, known = json.loads(place.read_text())
    # A memory that a full disk cut off is treated as absent.
    except (OSError, ValueError, TypeError):
        return None
    return known if tuple(numbers) == stamp and _SHA256.fullmatch(str(known)) else None


def _remember(place: Path, stamp: FileStamp, value: str) -> None:
    _write_memory(place, [*stamp, value])


def _write_memory(place: Path, content: object) -> None:
    """Write JSON atomically; without a writable cache it is computed again next time."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # Jobs of a sweep share the cache: rename is atomic, so that a reader sees the whole digest
        # or none.
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False) as stream:
            json.dump(content, stream)
        Path(stream.name).replace(place)
    except OSError:
        pass


_DIGEST_BYTES = hashlib.sha256().digest_size


def read_checked(place: Path) -> bytes | None:
    """Return what `write_checked` wrote; None if there is nothing, or not what was written."""
    try:
        content = place.read_bytes()
    except OSError:
        return None
    check, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return body if hashlib.sha256(body).digest() == check else None


def write_checked(place: Path, body: bytes) -> None:
    """Write bytes and their digest atomically; a cache that cannot be written is left as it is."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("wb", dir=place.parent, delete=False) as stream:
            written = Path(stream.name)
    except OSError:
        return
    try:
        written.write_bytes(hashlib.sha256(body).digest() + body)
        written.replace(place)
    except OSError:
        # On a full disk, one such file would be left by every run.
        written.unlink(missing_ok=True)


def contents_hash(files: Mapping[str, Path]) -> str:
    """Hash small files under the names given; their contents are read and not looked up."""
    total = hashlib.sha256()
    for name in sorted(files):
        content = files[name].read_bytes()
        # With the length, so that a byte moved from one file to the next changes the hash.
        total.update(f"{name} {len(content)}\n".encode() + content)
    return total.hexdigest()


# Up to this number each file has a memory of its own; more share one, which is read whole.
_OWN_MEMORY = 100
# A package of more files holds data rather than code: of these only imported modules are read.
_FILES_READ = 1000
MAX_READ_BYTES, MAX_REMEMBERED = 32 * 2**30, 1_000_000
"""Bytes and files of one set up to which an id covers their contents. More would be read for many
minutes before a run begins."""


def state_hash(files: Mapping[str, Path]) -> str:
    """Hash files under the names given by their content.

    A set above the limits counts by sizes and times, and the hash says so at its end.
    """
    states, weak = file_states(files)
    lines = [f"{name} {states[name]}\n" for name in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest() + (f" {weak}" if weak else "")


def file_states(files: Mapping[str, Path]) -> tuple[dict[str, str], str | None]:
    """Return the digest of each file, and None; of a set above the limits, sizes and times.

    In place of None there is then a sentence on what was not read.
    """
    if len(files) <= _OWN_MEMORY:
        return {name: digest(file) for name, file in files.items()}, None
    stamps = {name: file_stamp(file) for name, file in files.items()}
    total = sum(stamp[2] for stamp in stamps.values())
    if total > MAX_READ_BYTES or len(files) > MAX_REMEMBERED:
        states = {name: f"{stamp[2]} {stamp[3]}" for name, stamp in stamps.items()}
        return states, f"(by size and time: {len(files):,} files of {total / 2**30:.1f} GiB)"
    return _digests_of_set(files, stamps), None


def _digests_of_set(files: Mapping[str, Path], stamps: Mapping[str, FileStamp]) -> dict[str, str]:
    """Return the digests of many files, whose memory is one file: a million would fill the cache.

    As with `digest`, only files that nobody has written since are taken from it.
    """
    root = os.path.commonpath([file.absolute() for file in files.values()])
    place = cache_folder("digests") / hashlib.sha256(f"set {root}".encode()).hexdigest()
    known, began = _remembered_set(place), time.time_ns()
    found: dict[str, str] = {}
    fresh: dict[str, list[object]] = {}
    for name, file in files.items():
        stamp = stamps[name]
        *seen, value = known.get(name, (0, ""))
        if tuple(seen) != stamp or not _SHA256.fullmatch(str(value)):
            with file.open("rb") as stream:
                value = hashlib.file_digest(stream, "sha256").hexdigest()
        found[name] = str(value)
        # See `digest`: what was written a moment ago, or while it was read, is read again.
        if max(stamp[-2:]) < began - _CLOCK_STEP_NS and file_stamp(file) == stamp:
            fresh[name] = [*stamp, found[name]]
    if fresh != known:
        _write_memory(place, fresh)
    return found


def _remembered_set(place: Path) -> dict[str, list[object]]:
    try:
        known = json.loads(place.read_text())
        return {str(name): list(state) for name, state in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


# Libraries that an id names by their version. `bench` has a part of its own in an id.
_BY_VERSION = frozenset({"bench", "torch", "transformers", "lm_eval", "lmms_eval"})
# Packages of many methods or tasks, of which an id covers what is imported.
_BY_IMPORTS = _BY_VERSION | {"methods"}
# What a task may read from its own folder, which has the model cards of a harness as well.
_READ_SUFFIXES = frozenset(
    {".json", ".yaml", ".yml", ".toml", ".txt", ".csv", ".tsv", ".jinja", ".npy", ".npz",
     ".safetensors", ".so", ".cu", ".cpp"}
)  # fmt: skip


# Once per process, as Python imports a module once: an edit counts from the next process on.
@functools.cache
def code_hash(file: Path, module: str, own: str) -> str:
    """Hash a module with everything it imports from the package `own`, or from a working copy."""
    files = code_files(file, module, own)
    modules = {name: found for name, found in files.items() if "/" not in name}
    data = {name: found for name, found in files.items() if "/" in name}
    return contents_hash(modules) + (f"+{state_hash(data)}" if data else "")


def code_files(file: Path, module: str, own: str) -> dict[str, Path]:
    """Return the files that `code_hash` covers: modules by their names, data by names with a slash.

    A package counts whole, with everything that its modules import: what it reads, or imports by a
    name that it computes, cannot be told from its source. Of the packages of this repository and of
    harnesses only the imported modules count, so that a method does not change with another, and
    the data that lies with them. A single module lies among anything, so that only what it imports
    and what its strings name counts. Installed libraries are left out: they do not change without
    their version.
    """
    seen: dict[str, Path] = {}
    waiting: list[tuple[str, Path | None]] = [(module, file)]
    while waiting:
        name, found = waiting.pop()
        if name in seen or found is None:
            continue
        seen[name] = found
        # Importing a module runs the packages above it as well.
        imported = (name.rpartition(".")[0], *_imported_names(found, name))
        waiting += [(other, module_file(other, own)) for other in imported if other]
        modules, data = _files_with(found, name)
        waiting += modules.items()
        seen |= data
    return seen


def imported_libraries(file: Path, module: str, own: str) -> set[str]:
    """Return the installed libraries, by top-level module, that the code of `code_files` imports.

    Those of which an id has the version in any case are left out.
    """
    found: set[str] = set()
    for name, place in code_files(file, module, own).items():
        found |= {each.partition(".")[0] for each in _imported_names(place, name) if each}
    known = _BY_IMPORTS | sys.stdlib_module_names | {own}
    return {top for top in found - known if _places_of(top) and module_file(top, own) is None}


# Once per process: imported libraries keep their version even if the installation changes.
@functools.cache
def library_version(name: str) -> str | None:
    """Return the version of a library; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:  # whoever needs it says so
        return None


@functools.cache
def distribution_of(module: str) -> str:
    """Return the name under which a top-level module was installed: scikit-learn for sklearn."""
    # Listing the modules of all distributions takes a third of a second.
    if library_version(module) is not None:
        return module
    return packages_distributions().get(module, [module])[0]


def _files_with(file: Path, module: str) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return modules that may be imported along with one, and the data that it may read."""
    top = module.partition(".")[0]
    if "." not in module and file.stem != "__init__":
        return _named_in_strings(file)
    if top in _BY_IMPORTS:
        return {}, {f"{module}/{name}": path for name, path in _data_of(file.parent, top).items()}
    folders = tuple(place for place in _places_of(top) if file.is_relative_to(place))
    if folders:
        return _whole_package(top, folders)
    # Harnesses load files by path, under names by which Python does not find them.
    package = module if file.stem == "__init__" else module.rpartition(".")[0]
    return _whole_package(package, (file.parent,))


@functools.cache
def _whole_package(name: str, folders: tuple[Path, ...]) -> tuple[dict[str, Path], dict[str, Path]]:
    modules, data = {}, {}
    # As Python does, the first folder before the others, and `a/__init__.py` before `a.py`.
    for folder in reversed(folders):
        files = files_within(folder)
        for inside, file in sorted(files.items()):
            if file.suffix == ".py" and len(files) <= _FILES_READ:
                parts = Path(inside).with_suffix("").parts
                inner = parts[:-1] if parts[-1] == "__init__" else parts
                modules[".".join((name, *inner))] = file
            else:
                data[f"{name}/{inside}"] = file
    return modules, data


@functools.cache
def _data_of(folder: Path, top: str) -> dict[str, Path]:
    """Return what lies in the folder of a package, other than code and packages."""
    if top in _BY_VERSION:
        return {file.name: file for file in folder.iterdir() if file.suffix in _READ_SUFFIXES}
    files = files_within(folder, with_packages=False)
    return {name: file for name, file in files.items() if file.suffix != ".py"}


@functools.cache
def _named_in_strings(file: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the modules, files and folders beside a module that strings in its source name."""
    modules, data = {}, {}
    for text in _strings(file):
        # In an f-string, what follows the folder begins with a slash.
        name = text.strip("/")
        place = os.path.join(file.parent, name)  # noqa: PTH118 (pathlib drops dots)
        # The folder itself and what lies above it hold anything.
        if not Path(name).parts or ".." in Path(name).parts:
            continue
        # Not by pathlib, which raises if a sentence is too long for a path.
        if name.isidentifier() and os.path.isfile(f"{place}.py"):  # noqa: PTH113
            modules[name] = Path(f"{place}.py")
        if os.path.isfile(place):  # noqa: PTH113
            data[f"./{name}"] = Path(place)
        elif os.path.isdir(place):  # noqa: PTH112
            inside = files_within(Path(place))
            data |= {f"./{name}/{inner}": found for inner, found in inside.items()}
    return modules, data


def _strings(file: Path) -> set[str]:
    nodes = ast.walk(_parsed(file))
    values = {node.value for node in nodes if isinstance(node, ast.Constant)}
    return {value for value in values if isinstance(value, str)}


def files_within(folder: Path, *, with_packages: bool = True) -> dict[str, Path]:
    """Return the files below a folder that can be read, by relative name.

    Caches of Python and hidden folders, such as those of git, are left out; linked folders are not.
    """
    files: dict[str, Path] = {}
    entered: set[Path] = set()
    for place, inner, names in os.walk(folder, followlinks=True):
        here = Path(place)
        real = here.resolve()
        # A link may lead to a folder above it.
        if real in entered or not (here == folder or with_packages or "__init__.py" not in names):
            inner.clear()
            continue
        entered.add(real)
        inner[:] = sorted(n for n in inner if n != "__pycache__" and not n.startswith("."))
        found = [here / name for name in names if not name.endswith(".pyc")]
        readable = [file for file in found if file.is_file() and os.access(file, os.R_OK)]
        files |= {file.relative_to(folder).as_posix(): file for file in readable}
    return files


@functools.cache
def module_file(name: str, own: str) -> Path | None:
    """Return the file of a module; None if it is not `own` and comes from an installed library."""
    top, *parts = name.split(".")
    is_own = name == own or name.startswith(f"{own}.")
    if top in sys.stdlib_module_names or (top in _BY_VERSION and not is_own):
        return None
    for place in _places_of(top):
        if not is_own and {"site-packages", "dist-packages"} & set(place.parts):
            return None
        if not parts and place.is_file():
            return place
        inner = place.joinpath(*parts)
        candidates = (inner / "__init__.py", inner.with_suffix(".py") if parts else place)
        for file in candidates:
            if file.is_file():
                return file
    return None


@functools.cache
def _places_of(top: str) -> tuple[Path, ...]:
    """Return the file of a top-level module, or the folders of a package, without importing it."""
    # A package without `__init__.py` has folders and no file.
    module = sys.modules.get(top)
    folders, origin = getattr(module, "__path__", None), getattr(module, "__file__", None)
    if module is None:
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            spec = None
        folders = spec.submodule_search_locations if spec else None
        origin = spec.origin if spec and spec.has_location else None
    return tuple(map(Path, folders)) if folders else (Path(origin),) if origin else ()


# The methods of a run share most of what they import, and parsing is what takes time.
@functools.cache
def _imported_names(file: Path, module: str) -> tuple[str, ...]:
    """Return the absolute names of all modules that a file may import, at any depth of its code."""
    return tuple(_names_in_imports(file, module))


def _parsed(file: Path) -> ast.AST:
    """Return the syntax tree of a file; an empty one if it is compiled, or a draft that is not run.

    Python itself says what is wrong with a file that it runs.
    """
    try:
        return ast.parse(file.read_bytes() if file.suffix == ".py" else b"")
    except (SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])


def _names_in_imports(file: Path, module: str) -> Iterator[str]:
    package = module if file.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(_parsed(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            yield base
            # Whether a name is a module or a function is seen by looking for its file.
            yield from (f"{base}.{alias.name}" for alias in node.names)
