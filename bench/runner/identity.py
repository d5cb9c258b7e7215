"""Identity of a run: everything that can change its numbers, divided into parts.

The id of a run is the hash of these parts. The record stores the parts, so that it can be said how
two runs with different ids differ. If a part were missing, a run with a changed input would be
answered from an old record.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, get_origin

from bench.config.run_config import identity_of
from bench.data.digests import (
    code_files,
    code_hash,
    contents_hash,
    digest,
    distribution_of,
    imported_libraries,
    library_version,
    module_file,
    state_hash,
)
from bench.errors import UserError

if TYPE_CHECKING:
    from bench.config.run_config import RunConfig
    from bench.method import Method
    from bench.models.checkpoints import Quantization
    from bench.records import Record

_COUNTING_CODE = ("data", "device", "evaluation", "measurement", "models", "method.py", "runner")
"""Parts of bench that load, change, score or measure a model; the others only present results."""
_TRAINED_MODELS = "embedded"
"""Folder of `models` with trained weights and recipes; weights have a separate part of the id."""
_CODE_SUFFIXES = (".py", ".yaml")

# numpy computes in methods and metrics, tokenizers determines the input of a model. safetensors and
# datasets only transport bytes, which are hashed after reading.
_LIBRARIES = ("slimbench", "torch", "transformers", "tokenizers", "numpy", "lm-eval", "lmms-eval")
_IMAGE_LIBRARIES = ("pillow", "torchvision")
"""Libraries that decode and resize images, with small differences between versions."""


def method_identity(method: Method) -> str:
    """Return the class of a method with hashes of its code and of the files that its knobs name.

    The code is that of `code_files`, for the class and its base classes. A knob that names a
    module, or an object in a module, adds that module.
    """
    places, modules = _named_by_knobs(method)
    read = [f"{text} {_content(place)}" for text, place in places.items()]
    read += [f"{name} {code_hash(file, name, _top(name))}" for name, file in modules.items()]
    together = hashlib.sha256("\n".join(sorted(read)).encode()).hexdigest()
    return class_identity(type(method)) + (f" reading {together}" if read else "")


def _named_by_knobs(method: Method) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the files and folders, and the modules, that the knobs of a method name.

    A word that is a choice of the knob's type, as in `Literal["random", "first"]`, is no name.
    """
    places: dict[str, Path] = {}
    modules: dict[str, Path] = {}
    knobs = method.model_dump(mode="json", exclude=set(method.writes))
    for knob, value in knobs.items():
        field = type(method).model_fields.get(knob)
        for text in set(string_leaves(value)) - _words(field.annotation if field else None):
            if place := place_named(text, bare=True):
                places[text] = place
            if found := _module_named(text):
                modules[found[0]] = found[1]
    return places, modules


def _words(annotation: object) -> set[str]:
    """Return the string choices of a type (`Literal`), at any depth."""
    if get_origin(annotation) is Literal:
        return {word for word in get_args(annotation) if isinstance(word, str)}
    return set().union(*map(_words, get_args(annotation)))


def _module_named(text: str) -> tuple[str, Path] | None:
    """Return the module of a text such as `a.b` (a module), `a.b.C` or `a.b:C` (a name in it)."""
    name = text.replace(":", ".")
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    while name:
        if file := module_file(name, own=""):
            return name, file
        name = name.rpartition(".")[0]
    return None


def place_named(text: str, *, bare: bool = False) -> Path | None:
    """Return the file or folder that a text names; `bare` also accepts a folder without a slash.

    In a config, `digits` is a data set even if there is a folder of that name. In a knob of a
    method, it would be the folder.
    """
    # Not with pathlib, which raises if the text is too long for a path.
    path = os.path.expanduser(text)  # noqa: PTH111
    is_folder = (bare or "/" in text) and os.path.isdir(path)  # noqa: PTH112
    return Path(path) if is_folder or os.path.isfile(path) else None  # noqa: PTH113


def _content(place: Path) -> str:
    if place.is_file():
        return digest(place)
    files = [file for file in place.rglob("*") if file.is_file()]
    return state_hash({str(file.relative_to(place)): file for file in files})


def class_identity(kind: type) -> str:
    """Return the name of a class with a hash of its code and that of its base classes.

    Raises:
        UserError: the class has no source, so that changes could not be detected.
    """
    top = _top(kind.__module__)
    # The id has the code of bench and the versions of installed libraries in other parts.
    bases = [base for base in inspect.getmro(kind)[1:] if module_file(base.__module__, top)]
    codes = [_code_of_class(each) for each in (kind, *bases)]
    together = hashlib.sha256(" ".join(dict.fromkeys(codes)).encode()).hexdigest()
    return f"{kind.__module__}.{kind.__qualname__} {together}"


def method_files(method: Method) -> list[Path]:
    """Return the files of a method's code, and the files and folders that its knobs name."""
    places, modules = _named_by_knobs(method)
    found = list(places.values())
    file = getattr(sys.modules.get(type(method).__module__), "__file__", None)
    if file is not None:
        modules[type(method).__module__] = Path(file)
    for name, module in modules.items():
        found += code_files(module, name, _top(name)).values()
    return found


def _top(module: str) -> str:
    return module.partition(".")[0]


def _code_of_class(kind: type) -> str:
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is not None:
        return code_hash(Path(file), kind.__module__, _top(kind.__module__))
    try:  # A class defined in a notebook, whose cells `inspect` can read.
        return hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()
    except (OSError, TypeError):
        raise UserError(
            f"{kind.__module__}.{kind.__qualname__} has no source that can be read, so changes of "
            "it could not be detected: define the class in a file"
        ) from None


def string_leaves(node: object) -> Iterator[str]:
    """Yield every string in a tree of JSON values."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from string_leaves(inner)


@functools.cache
def scoring_code_identity() -> str:
    """Return a hash of the code of bench that can change numbers."""
    # Computed even for an installed package, whose files may have been edited.
    package = Path(__file__).parents[1]
    places = [package / name for name in _COUNTING_CODE]
    found = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place])]
    trained = package / "models" / _TRAINED_MODELS
    return contents_hash(
        {
            str(file.relative_to(package)): file
            for file in found
            if file.suffix in _CODE_SUFFIXES and trained not in file.parents
        }
    )


def library_versions(config: RunConfig, quantization: Quantization | None = None) -> dict[str, str]:
    """Return the versions of the libraries that can change a run's numbers.

    `quantization` is that of the model's checkpoint, if any, which a further library unpacks.
    """
    names = list(_LIBRARIES)
    if config.model.kind != "causal_lm":
        names += _IMAGE_LIBRARIES
    if config.model.device_map is not None:
        names.append("accelerate")
    if config.model.attention == "flash_attention_2":
        names.append("flash-attn")
    if config.model.adapter is not None:
        names.append("peft")
    if quantization is not None and quantization.library is not None:
        names.append(quantization.library)
    for method in config.method.values():
        names += _libraries_of(type(method))
    return {name: found for name in names if (found := library_version(name)) is not None}


_CHECKING_LIBRARIES = frozenset({"pydantic", "typing_extensions", "omegaconf", "hydra"})
"""Libraries that validate the knobs of methods and compute no number."""


@functools.cache
def _libraries_of(kind: type) -> list[str]:
    """Return the installed libraries that any module of a method's code imports."""
    found: set[str] = set()
    for each in inspect.getmro(kind):
        file = getattr(sys.modules.get(each.__module__), "__file__", None)
        if file is not None and module_file(each.__module__, _top(kind.__module__)):
            found |= imported_libraries(Path(file), each.__module__, _top(each.__module__))
    return sorted({distribution_of(name) for name in found - _CHECKING_LIBRARIES} - set(_LIBRARIES))


def identity_differences(
    one: Record, other: Record, *, shortened: bool = False
) -> list[dict[str, str]]:
    """Return one row per part of the identity in which two runs differ, with its dotted key.

    `shortened` abbreviates hashes for display.
    """
    ours, theirs = _flat_identity(one), _flat_identity(other)

    def shown(parts: dict[str, str], key: str) -> str:
        text = parts.get(key, "-")
        return _LONG_HASH.sub(lambda found: found.group()[:_SHORT], text) if shortened else text

    return [
        {"part": key, one.id: shown(ours, key), other.id: shown(theirs, key)}
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]


_LONG_HASH, _SHORT = re.compile(r"\b[0-9a-f]{40,64}\b"), 12


def _flat_identity(record: Record) -> dict[str, str]:
    """Return all parts of a recorded run's identity, the config by its dotted keys."""
    parts = record.provenance.get("identity") or {}
    try:
        config = identity_of(
            record.config,
            calibrated=record.provenance.get("calibration") is not None,
            prompted=record.provenance.get("prompts") is not None,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the config of run {record.id} is incomplete: {error}") from None
    # As in the id, device and dtype are separate parts with their resolved values.
    for key in ("device", "dtype"):
        config["model"].pop(key, None)
    # In the id they are pairs, because the order of methods matters.
    config["method"] = dict(config["method"])
    order = {"order of methods": ", ".join(config["method"]) or "dense"}
    return order | dict(_leaves(config, "")) | dict(_leaves(parts, ""))


def _leaves(node: object, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for key, inner in node.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, json.dumps(node, ensure_ascii=False) if not isinstance(node, str) else node
