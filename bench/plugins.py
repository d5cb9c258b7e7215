"""Packages outside this repository whose methods and configs every command finds.

Installed packages declare them by entry points, in their `pyproject.toml`:

    [project.entry-points."slimbench.conf"]
    mine = "mine.conf"                        # a folder with method/, model/, benchmark/, ...
    [project.entry-points."slimbench.methods"]
    zero_weakest = "mine.zeroing:ZeroWeakest"             # a class that needs no config file

A project file, `slimbench.toml`, declares the same for code that is not installed. It counts in its
folder and below. Unlike an installed package it comes with the folder, which may be a stranger's:
it is read only with the user's consent, which `bench trust` stores by path and content. A file that
`SLIMBENCH_PROJECT` names has it, since the environment is the user's.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import stat
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from bench.errors import UserError, nearest
from bench.security import CONFIG_DIR, IMPORTED_BY_NAME
from bench.ui import note

PROJECT_FILE = "slimbench.toml"
PROJECT_VARIABLE = "SLIMBENCH_PROJECT"
"""Names a project file, wherever the command runs; empty: none is looked for."""
CONFIG_GROUP, METHOD_GROUP = "slimbench.conf", "slimbench.methods"
MAX_BYTES = 64 * 1024
_KEYS = ("packages", "configs", "path", "methods")
_TARGET = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_METHOD_NAME = re.compile(r"[A-Za-z]\w*")
_RESERVED = frozenset(("bench", "conf", "results", *IMPORTED_BY_NAME))


@dataclass(frozen=True)
class Plugins:
    """What plug-ins add: packages whose code configs may name, config folders, and methods.

    `methods` maps a name to `module:Class`; `path` are folders in which packages are looked for
    after all others.
    """

    packages: tuple[str, ...] = ()
    configs: tuple[Path, ...] = ()
    methods: Mapping[str, str] = field(default_factory=dict)
    path: tuple[Path, ...] = ()

    def __add__(self, other: Plugins) -> Plugins:
        """Return both together; a method that both name is that of the first."""
        return Plugins(
            tuple(dict.fromkeys((*self.packages, *other.packages))),
            tuple(dict.fromkeys((*self.configs, *other.configs))),
            {**other.methods, **self.methods},
            tuple(dict.fromkeys((*self.path, *other.path))),
        )


def active() -> Plugins:
    """Return the plug-ins of this process and folder, whose packages can be imported afterwards.

    Raises:
        UserError: a declaration is wrong, or takes a name that slimbench itself has.
    """
    found = installed()
    file = project_file()
    if (untrusted := untrusted_project()) is not None:
        _tell_untrusted(untrusted)
    elif file is not None:
        found += read_project(file)
    for folder in found.path:
        # Last, so that nothing in a project hides an installed package.
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return found


def project_in_use() -> str | None:
    """Return the project file that counts here, for a process that is started from here."""
    file = project_file()
    return str(file) if file is not None and is_trusted(file) else None


def untrusted_project() -> Path | None:
    """Return the project file of this folder that the user has not agreed to, or None."""
    file = project_file()
    return None if file is None or is_trusted(file) else file


def config_file(group: str, name: str) -> Path | None:
    """Return the file of a config, shipped or of a plug-in; None if no file defines it."""
    for folder in (CONFIG_DIR, *active().configs):
        file = folder / group / f"{name}.yaml"
        if file.is_file():
            return file
    return None


@functools.cache
def installed() -> Plugins:
    """Return what installed packages declare by entry points.

    Raises:
        UserError: an entry point is wrong; the message names its distribution.
    """
    configs = [_config_folder(point) for point in entry_points(group=CONFIG_GROUP)]
    points = entry_points(group=METHOD_GROUP)
    methods = {point.name: point.value for point in points}
    for point in points:
        _check_method(point.name, point.value, f"entry point {METHOD_GROUP} of {_origin(point)}")
    packages = [point.value for point in entry_points(group=CONFIG_GROUP)] + list(methods.values())
    found = Plugins(tuple(dict.fromkeys(map(_top, packages))), tuple(configs), methods)
    _refuse_taken_names(found)
    return found


def project_file() -> Path | None:
    """Return the project file of the working folder or the nearest folder above it."""
    named = os.environ.get(PROJECT_VARIABLE)
    if named is not None:
        if named and not Path(named).is_file():
            raise UserError(f"{PROJECT_VARIABLE}={named}: no such file: name a {PROJECT_FILE}")
        return Path(named).absolute() if named else None
    try:
        here = Path.cwd()
    except OSError:  # the folder was removed under this process
        return None
    return next((p for f in (here, *here.parents) if (p := f / PROJECT_FILE).is_file()), None)


def read_project(file: Path) -> Plugins:
    """Read a project file; nothing that it names is imported.

    Raises:
        UserError: it cannot be read, or a key or value is wrong.
    """
    return _parse_project(file, _content(file))


# Composing a config asks for the plug-ins dozens of times.
@functools.lru_cache(maxsize=8)
def _parse_project(file: Path, text: bytes) -> Plugins:
    try:
        content = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no TOML: {error}") from None
    for key in content:
        if key not in _KEYS:
            close = nearest(key, _KEYS)
            hint = f"did you mean {close!r}? " if close else ""
            raise UserError(f"{file}: unknown key {key!r}: {hint}allowed: {', '.join(_KEYS)}")
    methods = content.get("methods", {})
    if not isinstance(methods, dict):
        raise UserError(f'{file}: methods={methods!r} is not a table, as in shrink = "mine:Shrink"')
    for name, target in methods.items():
        _check_method(name, target, str(file))
    packages = [*_texts(content, "packages", file), *map(_top, methods.values())]
    for package in packages:
        _check_package(package, file)
    folders = {
        key: tuple(_folder(file, key, text) for text in _texts(content, key, file))
        for key in ("configs", "path")
    }
    found = Plugins(
        tuple(dict.fromkeys(packages)),
        folders["configs"],
        methods,
        folders["path"] or (file.absolute().parent,),
    )
    _refuse_taken_names(found)
    return found


def trust(file: Path) -> None:
    """Store the user's consent to a project file as it is now."""
    known = _consents() | {str(file.resolve()): _digest(file)}
    place = consents_file()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # In one step: half a file would forget every other consent.
        handle, temporary = tempfile.mkstemp(dir=place.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as opened:
            opened.write(json.dumps(known, indent=1) + "\n")
        Path(temporary).replace(place)
    except OSError as error:
        raise UserError(
            f"{place} cannot be written: {error.strerror}: set {PROJECT_VARIABLE}={file} instead"
        ) from None


def is_trusted(file: Path) -> bool:
    """Tell whether the user has agreed to a project file as it is now."""
    if os.environ.get(PROJECT_VARIABLE):
        return True
    # A file that nobody agreed to is not even read.
    known = _consents().get(str(file.resolve()))
    return known is not None and known == _digest(file)


def consents_file() -> Path:
    """Return the file of the user's consents."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "slimbench" / "trusted.json"


def _consents() -> dict[str, str]:
    try:
        known = json.loads(consents_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    return known if isinstance(known, dict) else {}


def _digest(file: Path) -> str:
    return hashlib.sha256(_content(file)).hexdigest()


def _content(file: Path) -> bytes:
    try:
        # A pipe would wait for ever.
        if not stat.S_ISREG(file.stat().st_mode):
            raise UserError(f"{file} is not a regular file")
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # a name may hold a null byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file} cannot be read: {reason}") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{file} is larger than {MAX_BYTES} bytes, which no project file needs")
    return content


@functools.cache
def _tell_untrusted(file: Path) -> None:
    note(
        f"{file} is not trusted, so its methods and configs are left out; `bench trust` shows what "
        "it asks for and can allow it"
    )


def _texts(content: Mapping[str, object], key: str, file: Path) -> list[str]:
    value = content.get(key, [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f'{file}: {key}={value!r} is not a list of strings, as in ["mine"]')
    return value


def _folder(file: Path, key: str, text: str) -> Path:
    folder = Path(os.path.normpath(file.absolute().parent / text))
    if not folder.is_dir():
        raise UserError(f"{file}: {key}: {text} is not a folder in {file.absolute().parent}")
    return folder


def _check_package(name: str, file: Path) -> None:
    if not name.isidentifier():
        raise UserError(f"{file}: packages: {name!r} is not the name of a top-level package")
    if name in sys.stdlib_module_names or name in _RESERVED:
        raise UserError(f"{file}: packages: {name} is Python's or slimbench's own: name yours")


def _check_method(name: str, target: object, place: str) -> None:
    if not _METHOD_NAME.fullmatch(name):
        raise UserError(
            f"{place}: {name!r} is not a valid name of a method: use letters, digits and _"
        )
    if not isinstance(target, str) or not _TARGET.fullmatch(target):
        raise UserError(f"{place}: {name}={target!r} is not a class, as in 'mine.shrink:Shrink'")


def _refuse_taken_names(plugins: Plugins) -> None:
    """Raise if a plug-in has a config or method by a name of slimbench's own."""
    # The shipped file would be taken, and the plug-in's silently not.
    for folder in plugins.configs:
        for file in folder.rglob("*.yaml"):
            if (CONFIG_DIR / file.relative_to(folder)).is_file():
                raise UserError(f"{file}: slimbench has a config of this name: rename it")
    for name, target in plugins.methods.items():
        if (CONFIG_DIR / "method" / f"{name}.yaml").is_file():
            raise UserError(f"{target}: slimbench has a method {name!r}: give it another name")


def _config_folder(point: EntryPoint) -> Path:
    """Return the folder that an entry point names as a package, without importing it."""
    top, *parts = point.value.split(".")
    found = importlib.util.find_spec(top) if top.isidentifier() else None
    for place in (found.submodule_search_locations or ()) if found else ():
        folder = Path(place).joinpath(*parts)
        if folder.is_dir():
            return folder.absolute()
    raise UserError(
        f"entry point {CONFIG_GROUP} of {_origin(point)}: {point.value} is not a folder of an "
        "installed package"
    )


def _origin(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.name


def _top(target: str) -> str:
    return target.partition(":")[0].partition(".")[0]


def described(plugins: Plugins) -> Iterable[tuple[str, str]]:
    """Yield what plug-ins add as pairs of a kind and a value, for people."""
    yield from (("package", name) for name in plugins.packages)
    yield from (("configs", str(folder)) for folder in plugins.configs)
    yield from (("method", f"{name} = {target}") for name, target in plugins.methods.items())
    yield from (("path", str(folder)) for folder in plugins.path)
