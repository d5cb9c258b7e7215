"""Identity of a run: everything that can change its numbers, by part.

The id of a run is the hash of these parts, and the record keeps the parts: two runs with different
ids can then be told apart by what differs. A part that was left out would let a changed input find
the old record.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bench.config.run_config import identity_of

if TYPE_CHECKING:
    from bench.method import Method
    from bench.records import Record

# What transformers reads beside the weights: `from_pretrained` of config, tokenizer and processor.
# Recipes, licences and model cards are in the same folders and change no number.
_MODEL_FILES = (
    "config.json", "generation_config.json", "slimbench.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates/*",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
_SCORING_CODE = ("data", "device", "evaluation", "models", "method.py", "runner")
"""Parts of bench that load, change or score a model, and not those that measure or report."""
_CODE_SUFFIXES = (".py", ".yaml")


def model_files_identity(
    folder: Path, *, remote_code: bool, adapter: Path | None = None
) -> dict[str, str]:
    """Return the hash of every file that loading a model reads, its weights excepted."""
    patterns = (*_MODEL_FILES, "*.py") if remote_code else _MODEL_FILES
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    # Read on every run, and not looked up by time and size as weights are: the files are small.
    named = {f"file {file.relative_to(folder)}": file for file in sorted(files)}
    if adapter is not None:
        # Imported here: it needs torch, and a finished sweep is answered without.
        from bench.models.checkpoints import ADAPTER_CONFIG

        named[f"adapter {ADAPTER_CONFIG}"] = adapter / ADAPTER_CONFIG
    return {name: _hash_files([file]) for name, file in named.items()}


def method_identity(method: Method) -> str:
    """Return the class of a method with a hash of its code.

    The code is its module, and those modules of the same package that are imported from there.
    """
    kind = type(method)
    return f"{kind.__module__}.{kind.__qualname__} {_code_hash(kind.__module__)}"


def class_identity(target: str) -> str:
    """Return the name of a class, which is imported, with a hash of its code."""
    return f"{target} {_code_hash(target.rpartition('.')[0])}"


@functools.cache
def scoring_code_identity() -> str:
    """Return a hash of the code of bench that scores."""
    # Also of an installed package, whose files may have been edited.
    package = Path(__file__).parents[1]
    places = [package / name for name in _SCORING_CODE]
    found = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place])]
    return _hash_files(sorted(file for file in found if file.suffix in _CODE_SUFFIXES))


# Once per process, as Python imports a module once: an edit counts from the next process on.
@functools.cache
def _code_hash(module: str) -> str:
    """Return a hash of a module and of what it imports from its own top-level package."""
    top = module.partition(".")[0]
    origin = getattr(sys.modules[top], "__file__", None)
    if origin is None:  # defined in a notebook or an interactive session, without a file
        return "no file"
    if Path(origin).stem != "__init__":  # a single module, not a package
        return _hash_files([Path(origin)])
    root = Path(origin).parent
    seen: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = _module_file(root, name)
        if name in seen or file is None:
            continue
        seen[name] = file
        # Importing a module runs the packages above it as well.
        waiting.append(name.rpartition(".")[0])
        waiting += _imported_names(file, name)
    return _hash_files(seen[name] for name in sorted(seen))


def _module_file(root: Path, module: str) -> Path | None:
    """Return the file of a module of the package in `root`; None if it is not one of its."""
    top, *parts = module.split(".")
    if top != root.name:
        return None
    place = root.joinpath(*parts)
    candidates = (place / "__init__.py", place.with_suffix(".py"))
    return next((file for file in candidates if file.is_file()), None)


# The methods of a run share most of what they import, and parsing is what takes time.
@functools.cache
def _imported_names(file: Path, module: str) -> tuple[str, ...]:
    """Return the absolute names of all modules that a file may import, at any depth of its code."""
    return tuple(_names_in_imports(file, module))


def _names_in_imports(file: Path, module: str) -> Iterator[str]:
    package = module if file.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            yield base
            # Whether a name is a module or a function is seen by looking for its file.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _hash_files(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        # With the length, so that a byte moved from one file to the next changes the hash.
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def identity_differences(one: Record, other: Record) -> list[dict[str, str]]:
    """Return one row per part of the identity in which two runs differ."""
    ours, theirs = _flat_identity(one), _flat_identity(other)
    return [
        {"part": part, one.id: ours.get(part, "-"), other.id: theirs.get(part, "-")}
        for part in sorted(ours.keys() | theirs.keys())
        if ours.get(part) != theirs.get(part)
    ]


def _flat_identity(record: Record) -> dict[str, str]:
    """Return all parts of a recorded run's identity, the config by its dotted keys."""
    parts = record.provenance.get("identity") or {}
    config = identity_of(
        record.config,
        calibrated=record.provenance.get("calibration") is not None,
        prompted=record.provenance.get("prompts") is not None,
    )
    # As in the id: the resolved device and dtype stand among the parts.
    for key in ("device", "dtype"):
        config["model"].pop(key, None)
    return dict(_leaves(config, "")) | dict(_leaves(parts, ""))


def _leaves(node: object, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for key, inner in node.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, str(node)
