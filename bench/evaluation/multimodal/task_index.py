"""Finding lmms-eval's task files and definitions by name."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from lmms_eval.utils import load_yaml_config
from omegaconf import OmegaConf

from bench.errors import UserError, nearest, unknown_name
from bench.evaluation.multimodal.task_needs import (
    is_judges,
    judge_error,
    refuse_media,
    refuse_needs,
)
from bench.evaluation.task_packages import missing_package
from bench.evaluation.task_planning import TaskDefinition, TaskFiles, task_code_errors
from bench.schema import BenchmarkConfig

FILES = TaskFiles("lmms_eval", "lmms-eval", ours=Path(__file__).parent / "tasks" / "micro")
GENERATION_SETTINGS = ("until", "max_new_tokens")
"""Settings that affect greedy decoding."""
SUBMISSION_METRIC = "submission"
"""Name of metrics that write a file for a server and have no value."""
_TASK = re.compile(r"^task[ \t]*:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*\r?$", re.MULTILINE)
_GROUP = re.compile(r"^group[ \t]*:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*\r?$", re.MULTILINE)


@cache
def find_task_file(name: str) -> Path:
    """Return the harness's task file for `name`.

    Raises:
        UserError: no task has this name, or it is a group.
    """
    return FILES.find_included(name) or _search_task_files(name)


def _search_task_files(name: str) -> Path:
    names: set[str] = set()
    for file in sorted(FILES.harness_folder.rglob("*.yaml")):
        content = file.read_text(encoding="utf-8", errors="replace")
        tasks = _TASK.findall(content)
        if name in tasks:
            return file
        if name in _GROUP.findall(content):
            raise UserError(
                f"benchmark.tasks: {name} is a group of lmms-eval; list its tasks instead"
            )
        names.update(tasks)
    close = nearest(name, sorted(names))
    hint = f"did you mean {close!r}?" if close else "`lmms-eval --tasks list` lists them"
    raise UserError(f"unknown task {name!r} in benchmark.tasks: {hint}")


def read_task_definition(file: Path, benchmark: BenchmarkConfig) -> TaskDefinition:
    """Return a definition with its includes merged and its functions imported.

    Raises:
        UserError: the task needs a package that is not installed, a judge, videos or code
            execution, does not decode greedily, or is not a generate_until task.
    """
    # The file itself is checked first, because importing the module that it names may take minutes,
    # for example to download a dictionary.
    stated = _with_includes(file, functions=False)
    # The name of a file may differ from that of its task.
    name = str(stated.get("task") or file.stem)
    refuse_media(name, stated)
    definition = _with_includes(file)
    settings = {**(definition.get("generation_kwargs") or {}), **benchmark.gen_kwargs}
    _refuse_unknown_settings(benchmark)
    _refuse_unsupported(name, definition | {"generation_kwargs": settings})
    refuse_needs(name, definition, FILES.harness_folder)
    definition["generation_kwargs"] = settings
    metrics = [m for m in definition["metric_list"] if m["metric"] != SUBMISSION_METRIC]
    definition["metric_list"] = metrics
    if not metrics:
        raise UserError(f"task {name!r} only writes a submission file; it has no metric")
    prompts = (definition.get("lmms_eval_specific_kwargs") or {}).get("default", {})
    if "ocr" in prompts:
        prompts["ocr"] = benchmark.ocr_tokens
    return definition


def _with_includes(file: Path, *, functions: bool = True) -> TaskDefinition:
    """Merge includes; those in our files are relative to the harness's folder.

    Without `functions`, the task's code is not imported, and keys with functions are None.
    """
    if file.parent == FILES.ours:
        ours = {str(key): value for key, value in OmegaConf.load(file).items()}
        included = FILES.harness_folder / ours.pop("include")
        return {**_with_includes(included, functions=functions), **ours}
    try:
        with task_code_errors("lmms-eval", file.stem):
            mode = "full" if functions else "simple"
            loaded: TaskDefinition = load_yaml_config(str(file), mode=mode)
    except ImportError as error:
        raise missing_package("lmms_eval", file.stem, error) from error
    except UserError as error:
        # Some modules create a client of the judge on import.
        if is_judges(error.__cause__):
            raise judge_error(file.stem, "openai") from error
        raise
    return loaded


def _refuse_unknown_settings(benchmark: BenchmarkConfig) -> None:
    for name in benchmark.gen_kwargs:
        if name not in GENERATION_SETTINGS:
            raise unknown_name(
                "setting of lmms_eval in benchmark.gen_kwargs", name, GENERATION_SETTINGS
            )


def _refuse_unsupported(name: str, definition: TaskDefinition) -> None:
    if definition.get("output_type") != "generate_until" or "class" in definition:
        raise UserError(f"task {name!r} is not supported: only generate_until tasks are")
    options = definition.get("generation_kwargs") or {}
    beams = int(options.get("num_beams") or 1)
    if options.get("do_sample") or float(options.get("temperature") or 0) > 0 or beams > 1:
        raise UserError(
            f"task {name!r} uses sampling or beam search; only greedy decoding is supported"
        )
