"""Needs of lmms-eval's tasks besides a model: a judge's API, videos, execution of generated code.

Task files do not state them, so they are found by inspecting the scoring functions, before any run.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from bench.errors import UserError
from bench.evaluation.task_planning import TaskDefinition

JUDGES = (
    "lmms_eval.llm_judge", "lmms_eval.verifiers.openai", "openai", "anthropic", "requests",
    "google.generativeai", "google.genai", "dashscope",
)  # fmt: skip
"""Modules with which another model is asked to judge an answer."""
EXECUTION = ("subprocess", "multiprocessing", "exec")
"""Modules, and Python's own function, that execute code."""
MEDIA = ("video", "audio")


def refuse_media(name: str, definition: TaskDefinition) -> None:
    """Raise UserError for a task whose file shows that it is about media other than images."""
    options = definition.get("dataset_kwargs") or {}
    for kind in MEDIA:
        if options.get(kind):
            raise media_error(name, kind)


def refuse_needs(name: str, definition: TaskDefinition, folder: Path) -> None:
    """Raise UserError for a task that cannot be scored here; `folder` holds the harness's tasks."""
    needs = set(_modules_used(_scoring_functions(definition), folder))
    judge = next((each for each in JUDGES if each in needs), None)
    if judge is not None:
        raise judge_error(name, judge)
    if needs.intersection(EXECUTION):
        raise UserError(
            f"task {name!r} of lmms-eval executes generated code, which slimbench refuses: remove "
            "it from benchmark.tasks"
        )


def is_judges(error: BaseException | None) -> bool:
    """Return whether an error was raised by a judge's library, for example without its key."""
    return error is not None and _listed(type(error).__module__) in JUDGES


def judge_error(name: str, judge: str) -> UserError:
    """Build the error for a task whose answers another model judges."""
    return UserError(
        f"task {name!r} of lmms-eval is scored by a judge's API ({judge}), which slimbench does "
        "not call: remove it from benchmark.tasks"
    )


def media_error(name: str, kind: str) -> UserError:
    """Build the error for a task about media other than images."""
    return UserError(
        f"task {name!r} of lmms-eval needs {kind}; lmms_eval benchmarks are only about images"
    )


def _scoring_functions(definition: TaskDefinition) -> list[Callable[..., object]]:
    """Return the functions in a definition that process answers: scores, aggregates and filters."""
    named = [definition.get("process_results")]
    for metric in definition.get("metric_list") or ():
        named += [metric.get("metric"), metric.get("aggregation")]
    for pipeline in definition.get("filter_list") or ():
        named += [step.get("function") for step in pipeline.get("filter") or ()]
    return [each for each in named if callable(each)]


def _modules_used(functions: list[Callable[..., object]], folder: Path) -> Iterator[str]:
    """Yield which of the modules above the functions use, directly or through the folder's code."""
    seen: set[CodeType] = set()
    waiting: list[Any] = list(functions)
    while waiting:
        value = waiting.pop()
        if inspect.isclass(value):
            waiting += [each for each in vars(value).values() if inspect.isfunction(each)]
            continue
        while isinstance(value, functools.partial):
            value = value.func
        value = inspect.unwrap(getattr(value, "__func__", value))
        code: CodeType | None = getattr(value, "__code__", None)
        if code is None or code in seen or not Path(code.co_filename).is_relative_to(folder):
            continue
        seen.add(code)
        names = set(_names(code))
        scope: Mapping[str, Any] = value.__globals__
        # Imported inside the function, or a function of Python itself.
        yield from filter(None, (_listed(name) for name in names - scope.keys()))
        for found in (scope[name] for name in names & scope.keys()):
            listed = _listed(_module_of(found))
            if listed is not None:
                yield listed
            elif inspect.isfunction(found):
                waiting.append(found)
            else:
                waiting += _members(found, names)


def _names(code: CodeType) -> Iterator[str]:
    """Yield the globals, attributes and modules in a function's code, including inner functions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _module_of(value: object) -> str:
    """Return the module of a function, of a class or of the class of an object."""
    if isinstance(value, ModuleType):
        return value.__name__
    return str(getattr(value, "__module__", None) or type(value).__module__)


def _members(value: object, names: set[str]) -> list[Any]:
    """Return the functions with these names in a module, a class or an object."""
    owner = value if isinstance(value, ModuleType | type) else type(value)
    members = (getattr(owner, name, None) for name in names)
    return [each for each in members if inspect.isfunction(each)]


def _listed(module: str) -> str | None:
    known = (*JUDGES, *EXECUTION)
    return next((each for each in known if module == each or module.startswith(f"{each}.")), None)
