"""lmms-eval's task files and definitions, found by name."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

from lmms_eval.utils import load_yaml_config
from omegaconf import OmegaConf

from bench.errors import UserError, nearest, unknown_name
from bench.schema import BenchmarkConfig

MICRO_TASKS = Path(__file__).parent / "tasks" / "micro"
"""Our task files; each includes one of the harness's and replaces the source of its data."""
_TASK = re.compile(r"^task[ \t]*:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*\r?$", re.MULTILINE)
_GROUP = re.compile(r"^group[ \t]*:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*\r?$", re.MULTILINE)


def micro_names() -> tuple[str, ...]:
    """Return the names of the tasks with embedded data."""
    return tuple(sorted(file.stem for file in MICRO_TASKS.glob("*.yaml")))


@cache
def harness_folder() -> Path:
    """Return the folder of lmms-eval's task files, wherever it is installed."""
    # Finding a spec does not import lmms-eval, which takes seconds.
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or spec.origin is None:
        raise UserError("lmms-eval is not installed: `pip install lmms-eval`")
    return Path(spec.origin).parent / "tasks"


def find_micro_task_file(name: str) -> Path:
    """Return our task file for `name`.

    Raises:
        UserError: the task has no embedded data.
    """
    if name not in micro_names():
        raise unknown_name("task of benchmark.suite=micro", name, micro_names())
    return MICRO_TASKS / f"{name}.yaml"


@cache
def find_task_file(name: str) -> Path:
    """Return the harness's task file for `name`.

    Raises:
        UserError: no task has this name, or it is a group.
    """
    ours = MICRO_TASKS / f"{name}.yaml"
    if ours.is_file():
        return harness_folder() / included_path(ours)
    return _search_task_files(name)


def included_path(file: Path) -> str:
    """Return the path that one of our task files includes, relative to the harness's folder."""
    (line,) = re.findall(r"^include: *(\S+)", file.read_text(), re.MULTILINE)
    return str(line)


def _search_task_files(name: str) -> Path:
    names: set[str] = set()
    for file in sorted(harness_folder().rglob("*.yaml")):
        content = file.read_text(encoding="utf-8", errors="replace")
        found = _TASK.findall(content)
        if name in found:
            return file
        if name in _GROUP.findall(content):
            raise UserError(
                f"benchmark.tasks: {name} is a group of lmms-eval; list its tasks instead"
            )
        names.update(found)
    close = nearest(name, sorted(names))
    hint = f"did you mean {close!r}?" if close else "`lmms-eval --tasks list` lists them"
    raise UserError(f"unknown task {name!r} in benchmark.tasks: {hint}")


SUBMISSION_METRIC = "submission"
"""Name of metrics that write a file for a server and have no value."""


def read_task_definition(file: Path, benchmark: BenchmarkConfig) -> dict[str, Any]:
    """Return a definition with its includes merged and its functions imported.

    Raises:
        UserError: the task needs a package that is not installed, does not decode greedily, or is
            not a generate_until task.
    """
    defined = _with_includes(file)
    _refuse_unsupported(file.stem, defined)
    defined["metric_list"] = [m for m in defined["metric_list"] if m["metric"] != SUBMISSION_METRIC]
    if not defined["metric_list"]:
        raise UserError(f"task {file.stem!r} only writes a submission file; it has no metric")
    prompts = (defined.get("lmms_eval_specific_kwargs") or {}).get("default", {})
    if "ocr" in prompts:
        prompts["ocr"] = benchmark.ocr_tokens
    return defined


def _with_includes(file: Path) -> dict[str, Any]:
    """Merge includes; those of our files are relative to the harness's folder."""
    if file.parent == MICRO_TASKS:
        ours = {str(key): value for key, value in OmegaConf.load(file).items()}
        return {**_with_includes(harness_folder() / ours.pop("include")), **ours}
    try:
        loaded: dict[str, Any] = load_yaml_config(str(file), mode="full")
    except ImportError as error:
        raise UserError(f"lmms-eval's {file.name} needs a missing package: {error}") from error
    return loaded


def evaluated_split(defined: dict[str, Any]) -> str:
    """Return the split that the harness scores: test if the task has one, else validation."""
    return str(defined.get("test_split") or defined.get("validation_split")).strip()


def _refuse_unsupported(name: str, defined: dict[str, Any]) -> None:
    if defined.get("output_type") != "generate_until" or "class" in defined:
        raise UserError(f"task {name!r} is not supported: only generate_until tasks are")
    options = defined.get("generation_kwargs") or {}
    beams = int(options.get("num_beams") or 1)
    if options.get("do_sample") or float(options.get("temperature") or 0) > 0 or beams > 1:
        raise UserError(
            f"task {name!r} uses sampling or beam search; only greedy decoding is supported"
        )
