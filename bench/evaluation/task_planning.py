"""Planning shared by both harnesses: task files, splits, missing data.

The logs and progress bars of lm-eval are suppressed, because `bench.ui` shows the progress and a
second bar would break its display. lmms-eval must not be imported here: it takes seconds, and runs
on text do not need it.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import importlib.util
import inspect
import json
import logging
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import datasets
import lm_eval.api.task
from omegaconf import OmegaConf

from bench.data import hub
from bench.data.digests import (
    code_hash,
    distribution_of,
    imported_libraries,
    library_version,
    module_file,
)
from bench.errors import MissingData, UserError, error_sentence, exit_reason, unknown_name
from bench.evaluation.harness import DocumentSource, hub_source
from bench.schema import BenchmarkConfig
from bench.security import CONFIG_DIR

Planned = TypeVar("Planned")
TaskDefinition: TypeAlias = dict[str, Any]
"""A task file with its includes merged; its keys are defined by the harness."""
Splits: TypeAlias = dict[str, Any]
"""Data sets by split: a `datasets.DatasetDict`, or the result of a task's own code."""


@dataclass(frozen=True)
class TaskFiles:
    """Task files of an installed harness, and those of the suite for the embedded data.

    Each file in the folder `ours` includes a file of the harness and replaces the source of its
    data. `distribution` is the distribution name of `package`.
    """

    package: str
    distribution: str
    ours: Path

    @property
    def harness_folder(self) -> Path:
        """The folder of the installed harness's task files."""
        return _installed_tasks(self.package, self.distribution)

    def micro_names(self) -> tuple[str, ...]:
        """Return the names of the tasks with embedded data."""
        return tuple(sorted(file.stem for file in self.ours.glob("*.yaml")))

    def find_micro(self, name: str) -> Path:
        """Return the suite's task file for `name`.

        Raises:
            UserError: the task has no embedded data.
        """
        if name not in self.micro_names():
            raise unknown_name("task of benchmark.suite=micro", name, self.micro_names())
        return self.ours / f"{name}.yaml"

    def find_included(self, name: str) -> Path | None:
        """Return the harness's file that the suite's file for `name` includes, or None.

        This avoids a search through all files of the harness.
        """
        ours = self.ours / f"{name}.yaml"
        if not ours.is_file():
            return None
        (name,) = _included_names(ours.read_text())
        file = self.harness_folder / name
        return file if file.is_file() else None


def folders_of(file: Path) -> frozenset[Path]:
    """Return the folders of a task file and of the files that it includes, with their code."""
    return frozenset(each.parent for each in included_files(file))


def included_files(file: Path) -> frozenset[Path]:
    """Return a task file and the files that it includes, recursively."""
    seen: set[Path] = set()
    waiting = [file]
    while waiting:
        current = waiting.pop().resolve()
        if current not in seen and current.is_file():
            seen.add(current)
            text = current.read_text(encoding="utf-8", errors="replace")
            waiting += [current.parent / name for name in _included_names(text)]
    return frozenset(seen)


def _included_names(text: str) -> list[str]:
    """Return the files that a task file includes: one, or a list of them."""
    return [name for names in _INCLUDE.findall(text) for name in _FILE_NAME.findall(names)]


# A pattern, because a plain YAML loader rejects the `!function` tags of task files.
_INCLUDE = re.compile(
    r"^[\"']?include[\"']?[ \t]*:((?:[ \t]*[^\s#][^\r\n]*)|(?:\s*\n[ \t]*-[^\r\n]+)+)", re.MULTILINE
)
_FILE_NAME = re.compile(r"[^\s\"',\[\]-][^\s\"',\[\]]*")


@cache
def _installed_tasks(package: str, distribution: str) -> Path:
    # Finding a spec does not import the harness, which takes seconds.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"{distribution} is not installed: `pip install {distribution}`")
    return Path(spec.origin).parent / "tasks"


def evaluated_split(definition: Mapping[str, Any]) -> str:
    """Return the split that the harness scores: test if the task has one, else validation."""
    # Stripped, because some files of lmms-eval have a space after the name.
    return str(definition.get("test_split") or definition.get("validation_split")).strip()


def refuse_unknown_tasks(benchmark: BenchmarkConfig, tasks: Iterable[str]) -> None:
    """Raise UserError if a setting per task names a task that is not scored."""
    known = list(tasks)
    shots = benchmark.num_fewshot
    for key, mapping in {"data": benchmark.data, "num_fewshot": shots}.items():
        for name in mapping if isinstance(mapping, dict) else ():
            if name not in known:
                raise unknown_name(f"task in benchmark.{key}", name, known)


def reads_hub(benchmark: BenchmarkConfig) -> bool:
    """Return whether a task of the benchmark needs data of the hub."""
    return benchmark.suite == "real" and bool(set(benchmark.tasks) - set(benchmark.data))


def go_offline_if_needed(*, offline: bool, needs_hub: bool) -> None:
    """Stop the process from using the hub if the user asks for that or the hub is unreachable."""
    # Decided once, because otherwise every data set would wait for its own timeout.
    if offline or (needs_hub and not hub.is_reachable()):
        hub.go_offline()


def collect(
    names: Iterable[str], build: Callable[[str], Planned], missing: list[str]
) -> list[Planned]:
    """Call `build` for each name; data that cannot be reached are added to `missing`."""
    # All failures are collected, so that a user need not fix them one run at a time.
    built = []
    for name in names:
        try:
            built.append(build(name))
        except hub.DatasetUnreachable as error:
            missing.append(f"{error} ({name})")
    return built


def refuse_missing_data(benchmark: BenchmarkConfig, missing: list[str], local_keys: str) -> None:
    """Raise MissingData unless nothing is missing; `local_keys` are those that take a file."""
    if missing:
        raise MissingData(
            f"benchmark {benchmark.name} needs data that are neither cached nor reachable: "
            f"{'; '.join(missing)}. Run `{prefetch_command(benchmark)}` with a network, or give "
            f"local files: {local_keys}",
            missing,
        )


def prefetch_command(benchmark: BenchmarkConfig) -> str:
    """Return the command that downloads the data of a benchmark."""
    # The name of a harness's benchmark is followed by `:` and its tasks.
    choice = benchmark.name.partition(":")[0]
    command = f"bench prefetch benchmark={choice}"
    # Tasks are left out if they are those of the shipped config.
    if _shipped_tasks(choice) != list(benchmark.tasks):
        command += f' "benchmark.tasks=[{",".join(benchmark.tasks)}]"'
    return command


def _shipped_tasks(name: str) -> list[str] | None:
    """Return the tasks of a shipped benchmark's config, or of the configs that it extends."""
    file = CONFIG_DIR / "benchmark" / f"{name}.yaml"
    content = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else None
    if not isinstance(content, dict):
        return None
    if "tasks" in content:
        return list(content["tasks"])
    parents = [str(each) for each in content.get("defaults", ()) if each != "_self_"]
    return next((tasks for each in parents if (tasks := _shipped_tasks(each))), [])


@contextmanager
def task_code_errors(harness: str, task: str) -> Iterator[None]:
    """Convert errors of a task's own code during its setup into one sentence with its name.

    Such code may need the API key of a judge or an environment variable, or may call `sys.exit`.
    Every error in the `with` block is attributed to the task, so it must contain only calls into
    the harness.
    """
    try:
        yield
    # Callers have their own messages for missing packages and data.
    except (UserError, hub.DatasetUnreachable, ImportError, OSError):
        raise
    except (Exception, SystemExit) as error:
        reason = task_fault(error)
        raise UserError(f"task {task!r} of {harness} cannot be set up: {reason}") from error


def task_fault(error: Exception | SystemExit) -> str:
    """Return the reason why a task's own code failed."""
    if isinstance(error, SystemExit):
        return f"its code ended the program ({exit_reason(error)})"
    name = error.args[0] if isinstance(error, KeyError) and error.args else None
    # The message of `os.environ["HF_HOME"]` is only the name.
    if isinstance(name, str) and name.isupper() and name not in os.environ:
        return f"it needs the environment variable {name}"
    line = _own_code_line(error)
    return error_sentence(error) + (f" ({line})" if line else "")


def _own_code_line(error: BaseException) -> str | None:
    """Return `FILE:LINE` of the innermost frame in a file that belongs to no installed package.

    Harnesses load the file of a `!function` by its path and name it as its task file does.
    """
    installed = (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), str(_PROGRAM))
    packages = tuple(f"{folder}{os.sep}" for folder in installed)
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        # Compiled templates have names such as `<template>`.
        if Path(file).is_absolute() and not file.startswith(packages):
            found = f"{file}:{line}"
    return found


_PROGRAM = Path(__file__).parents[1]


def hub_options(definition: TaskDefinition) -> dict[str, Any]:
    """Return the options with which `datasets` loads a task's data."""
    options = dict(definition.get("dataset_kwargs") or {})
    # `datasets` rejects the first. The second requires a login, and task files set it even for
    # public data sets.
    for name in ("trust_remote_code", "token"):
        options.pop(name, None)
    return options


def load_from_hub(definition: TaskDefinition) -> tuple[Splits, DocumentSource]:
    """Load a task's data set from the hub or its cache.

    Raises:
        DatasetUnreachable: the data set is neither cached nor reachable.
    """
    location = (definition["dataset_path"], definition.get("dataset_name"))
    data = hub.load_dataset(*location, **hub_options(definition))
    name = hub.dataset_name(*location)
    return data, hub_source(name, hub.commit_of(data), content_fingerprint(data))


def content_fingerprint(data: Splits) -> str:
    """Return a fingerprint of loaded documents."""
    # The fingerprint of `datasets`, because hashing the rows could take reading gigabytes. The code
    # of a task may also return plain rows.
    return "-".join(
        str(getattr(split, "_fingerprint", None) or rows_hash(split))
        for _, split in sorted(data.items())
    )


def rows_hash(rows: Iterable[object]) -> str:
    """Return the SHA-256 of rows of plain values."""
    described = json.dumps(list(rows), sort_keys=True, default=repr)
    return hashlib.sha256(described.encode()).hexdigest()


CONFIG_SOURCE = "config_source"
"""Metadata key in which lm-eval stores the path of a task file, which is not a part of the task."""


def definition_hash(definition: object, files: TaskFiles) -> str:
    """Return a hash of a task as resolved by its harness: settings, and the code that they name.

    Code in the task folders of the harness or of the user is hashed, with everything in its folder.
    The rest of the harness, and libraries that the code uses, such as one that computes a metric,
    are identified by their versions.
    """
    described = json.dumps(_described(definition, files), sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def _described(value: object, files: TaskFiles) -> object:
    """Convert a part of a definition to JSON values that differ if the parts differ."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    # lm-eval's own classes of settings are empty mappings with fields.
    if isinstance(value, Mapping) and not is_dataclass(value):
        return {
            str(key): _described(inner, files)
            for key, inner in value.items()
            if key != CONFIG_SOURCE
        }
    if isinstance(value, list | tuple):
        return [_described(inner, files) for inner in value]
    if isinstance(value, functools.partial):
        return [_described(part, files) for part in (value.func, value.args, value.keywords)]
    if hasattr(value, "__qualname__"):
        return _described_code(value, files)
    if not hasattr(value, "__dict__"):
        return repr(value)
    # An object of the harness, such as the settings of few-shot examples, whose `repr` may contain
    # its memory address.
    return [_described_code(type(value), files), _described(vars(value), files)]


def _described_code(value: Any, files: TaskFiles) -> str:
    """Return the name of a function or class, with a hash of its code or the library's version."""
    module, name = str(value.__module__), f"{value.__module__}.{value.__qualname__}"
    code = getattr(inspect.unwrap(value), "__code__", None)
    source = code.co_filename if code else getattr(sys.modules.get(module), "__file__", None)
    file = Path(str(source))
    if file.is_relative_to(files.harness_folder):
        # Harnesses load these files by path, under names that cannot be imported.
        inside = file.with_suffix("").relative_to(files.harness_folder.parents[1])
        return f"{name} {_content(file, '.'.join(inside.parts), f'{files.package}.tasks')}"
    # lm-eval names the modules of a user's folder by their paths.
    if "/" in module:
        folder = file.parent.name
        return f"{value.__qualname__} {_content(file, f'{folder}.{file.stem}', folder)}"
    if module_file(module, own="") is None:
        return " ".join([name, *_versions(_libraries_named(value) if code else ())])
    return f"{name} {_content(file, module, module)}"


def _content(file: Path, module: str, own: str) -> str:
    """Return a hash of code and the files it reads, with the versions of imported libraries."""
    libraries = imported_libraries(file, module, own)
    return " ".join([code_hash(file, module, own), *_versions(libraries)])


def _libraries_named(function: Any) -> set[str]:
    """Return the top-level modules that a function of a library imports or has imported."""
    code, names = inspect.unwrap(function).__code__, inspect.unwrap(function).__globals__
    # `sacrebleu.corpus_bleu`, by a name that the function's module imported ...
    found = {names[name].__name__ for name in code.co_names if inspect.ismodule(names.get(name))}
    # ... and `from sklearn.metrics import f1_score`.
    found |= {step.argval for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME"}
    return {name.partition(".")[0] for name in found} - sys.stdlib_module_names


def _versions(modules: Iterable[str]) -> list[str]:
    installed = {distribution_of(module) for module in modules}
    return [f"{name}=={library_version(name)}" for name in sorted(installed)]


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Suppress the logs and progress bars of lm-eval and of `datasets`."""
    harness_log = logging.getLogger("lm_eval")
    level, verbosity = harness_log.level, datasets.utils.logging.get_verbosity()
    bars = datasets.utils.logging.is_progress_bar_enabled()
    harness_log.setLevel(logging.ERROR)
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    bar = lm_eval.api.task.tqdm
    # This bar cannot be disabled by an argument or a setting, so its name is patched.
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        harness_log.setLevel(level)
        datasets.utils.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
