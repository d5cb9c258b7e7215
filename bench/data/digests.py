"""Digests of files and of source code, for ids that depend on every byte.

The digest of a large file is cached in the user's cache folder, so that weights are not read in
every run. A cached digest is used only if device, inode, size, modification time and change time of
the file are unchanged. Only the kernel sets the change time, so a file that was replaced with the
same size and modification time (tar, rsync, Nix, image layers) is read again.
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
"""Device, inode, size, modification and change time of a file, which change with every write."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
# The coarsest clocks of common file systems (FAT, old NFS) have steps of two seconds.
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
    """Return the SHA-256 of a file's content, read or cached."""
    real = file.resolve()
    place = cache_folder("digests") / hashlib.sha256(str(real).encode()).hexdigest()
    began, before = time.time_ns(), file_stamp(real)
    known = _remembered(place, before)
    if known is not None:
        return known
    with real.open("rb") as stream:
        computed = hashlib.file_digest(stream, "sha256").hexdigest()
    # As in git's index: a second write within one step of the clock does not change the times. So
    # files written shortly before they are read are read again next time.
    at_rest = max(before[-2:]) < began - _CLOCK_STEP_NS
    if at_rest and file_stamp(real) == before:
        _remember(place, before, computed)
    return computed


def cache_folder(name: str) -> Path:
    """Return a folder for files that are kept between runs only to save time."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "slimbench" / name


def _remembered(place: Path, stamp: FileStamp) -> str | None:
    """Return the cached value for a file in this state; None if it is absent or unreadable."""
    try:
        *numbers, known = json.loads(place.read_text())
    # A value that a full disk truncated counts as absent.
    except (OSError, ValueError, TypeError):
        return None
    return known if tuple(numbers) == stamp and _SHA256.fullmatch(str(known)) else None


def _remember(place: Path, stamp: FileStamp, value: str) -> None:
    _write_memory(place, [*stamp, value])


def _write_memory(place: Path, content: object) -> None:
    """Write JSON atomically; if the cache is not writable, it is computed again next time."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # Jobs of a sweep share the cache. A rename is atomic, so readers see a complete digest or
        # none.
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False) as stream:
            json.dump(content, stream)
        Path(stream.name).replace(place)
    except OSError:
        pass


_DIGEST_BYTES = hashlib.sha256().digest_size


def read_checked(place: Path) -> bytes | None:
    """Return what `write_checked` wrote; None if it is absent or damaged."""
    try:
        content = place.read_bytes()
    except OSError:
        return None
    check, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return body if hashlib.sha256(body).digest() == check else None


def write_checked(place: Path, body: bytes) -> None:
    """Write bytes and their digest atomically, if the cache is writable."""
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
        # On a full disk, every run would leave such a file.
        written.unlink(missing_ok=True)


def contents_hash(files: Mapping[str, Path]) -> str:
    """Hash small files under the given names, reading their contents without the cache."""
    total = hashlib.sha256()
    for name in sorted(files):
        content = files[name].read_bytes()
        # With the length, so that moving a byte from one file to the next changes the hash.
        total.update(f"{name} {len(content)}\n".encode() + content)
    return total.hexdigest()


# Up to this number, each file has its own cache entry; larger sets share one.
_OWN_MEMORY = 100
# A package with more files contains data rather than code; only its imported modules are read.
_FILES_READ = 1000
MAX_READ_BYTES, MAX_REMEMBERED = 32 * 2**30, 1_000_000
"""Maximum bytes and files of a set whose contents are part of an id. Reading more would delay the
start of a run by many minutes."""


def state_hash(files: Mapping[str, Path]) -> str:
    """Hash files by their contents, under the given names.

    Sets above the limits are hashed by sizes and times, which the end of the hash states.
    """
    states, weak = file_states(files)
    lines = [f"{name} {states[name]}\n" for name in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest() + (f" {weak}" if weak else "")


def file_states(files: Mapping[str, Path]) -> tuple[dict[str, str], str | None]:
    """Return the digest of each file, and None; or for sets above the limits, sizes and times.

    In the second case, None is replaced by a sentence about what was not read.
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
    """Return the digests of many files, with a single cache file: one per digest would be too many.

    As in `digest`, cached values are used only for files that have not been written since.
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
        # See `digest`: files written shortly before or during reading are read again.
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


# Libraries whose versions are part of an id. `bench` has its own part of an id.
_BY_VERSION = frozenset({"bench", "torch", "transformers", "lm_eval", "lmms_eval"})
# Packages with many methods or tasks, of which only imported modules are part of an id.
_BY_IMPORTS = _BY_VERSION | {"methods"}
# Files that a task may read from its own folder, which also has a harness's model cards.
_READ_SUFFIXES = frozenset(
    {".json", ".yaml", ".yml", ".toml", ".txt", ".csv", ".tsv", ".jinja", ".npy", ".npz",
     ".safetensors", ".so", ".cu", ".cpp"}
)  # fmt: skip


# Once per process, because Python also imports a module once: edits affect the next process.
@functools.cache
def code_hash(file: Path, module: str, own: str) -> str:
    """Hash a module and everything it imports from the package `own` or from a working copy."""
    files = code_files(file, module, own)
    modules = {name: found for name, found in files.items() if "/" not in name}
    data = {name: found for name, found in files.items() if "/" in name}
    return contents_hash(modules) + (f"+{state_hash(data)}" if data else "")


def code_files(file: Path, module: str, own: str) -> dict[str, Path]:
    """Return the files that `code_hash` covers: modules by name, data by names with a slash.

    A package is included as a whole, with everything that its modules import, because its source
    does not show what it reads or imports by computed names. In the packages of this repository and
    of harnesses, only imported modules are included, and data beside them, so that a method does
    not change with another one. A single module may lie among unrelated files, so only its imports
    and files named in its strings are included. Installed libraries are left out, because they
    change only with their version.
    """
    seen: dict[str, Path] = {}
    waiting: list[tuple[str, Path | None]] = [(module, file)]
    while waiting:
        name, found = waiting.pop()
        if name in seen or found is None:
            continue
        seen[name] = found
        # Importing a module also runs the packages above it.
        imported = (name.rpartition(".")[0], *_imported_names(found, name))
        waiting += [(other, module_file(other, own)) for other in imported if other]
        modules, data = _files_with(found, name)
        waiting += modules.items()
        seen |= data
    return seen


def imported_libraries(file: Path, module: str, own: str) -> set[str]:
    """Return the installed libraries, by top-level module, that the code of `code_files` imports.

    Libraries whose versions are always part of an id are left out.
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
    except PackageNotFoundError:  # Code that needs it raises its own error.
        return None


@functools.cache
def distribution_of(module: str) -> str:
    """Return the distribution of a top-level module, for example scikit-learn for sklearn."""
    # Cached, because listing the modules of all distributions takes a third of a second.
    if library_version(module) is not None:
        return module
    return packages_distributions().get(module, [module])[0]


def _files_with(file: Path, module: str) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the modules that may be imported with a module, and the data that it may read."""
    top = module.partition(".")[0]
    if "." not in module and file.stem != "__init__":
        return _named_in_strings(file)
    if top in _BY_IMPORTS:
        return {}, {f"{module}/{name}": path for name, path in _data_of(file.parent, top).items()}
    folders = tuple(place for place in _places_of(top) if file.is_relative_to(place))
    if folders:
        return _whole_package(top, folders)
    # Harnesses load files by path, under names with which Python does not find them.
    package = module if file.stem == "__init__" else module.rpartition(".")[0]
    return _whole_package(package, (file.parent,))


@functools.cache
def _whole_package(name: str, folders: tuple[Path, ...]) -> tuple[dict[str, Path], dict[str, Path]]:
    modules, data = {}, {}
    # As in Python, the first folder precedes the others, and `a/__init__.py` precedes `a.py`.
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
    """Return the files in the folder of a package other than code and subpackages."""
    if top in _BY_VERSION:
        return {file.name: file for file in folder.iterdir() if file.suffix in _READ_SUFFIXES}
    files = files_within(folder, with_packages=False)
    return {name: file for name, file in files.items() if file.suffix != ".py"}


@functools.cache
def _named_in_strings(file: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return modules, files and folders beside a module that are named in its strings."""
    modules, data = {}, {}
    for text in _strings(file):
        # In an f-string, the part after the folder starts with a slash.
        name = text.strip("/")
        place = os.path.join(file.parent, name)  # noqa: PTH118 (pathlib drops dots)
        # The folder itself and its parents may contain anything.
        if not Path(name).parts or ".." in Path(name).parts:
            continue
        # Not with pathlib, which raises if a sentence is too long for a path.
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
    """Return the readable files below a folder by relative name.

    Caches of Python and hidden folders, such as git's, are left out; linked folders are included.
    """
    files: dict[str, Path] = {}
    entered: set[Path] = set()
    for place, inner, names in os.walk(folder, followlinks=True):
        here = Path(place)
        real = here.resolve()
        # A link may lead to a parent folder.
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
    """Return the file of a module; None if it is not `own` and is in an installed library."""
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
    # A package without `__init__.py` has folders but no file.
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


# Cached, because methods of a run share most of their imports and parsing is slow.
@functools.cache
def _imported_names(file: Path, module: str) -> tuple[str, ...]:
    """Return the absolute names of all modules that a file may import, at any depth of its code."""
    return tuple(_names_in_imports(file, module))


def _parsed(file: Path) -> ast.AST:
    """Return the syntax tree of a file, empty for compiled files and for files with syntax errors.

    Python itself reports syntax errors in a file that it runs.
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
            # Whether a name is a module or a function depends on whether its file exists.
            yield from (f"{base}.{alias.name}" for alias in node.names)
