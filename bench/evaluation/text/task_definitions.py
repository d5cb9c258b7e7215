"""Definitions of lm-eval's tasks: which can be run, and the settings that a benchmark changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import yaml  # type: ignore[import-untyped]
from lm_eval.api import metrics  # noqa: F401 (fills the registry)
from lm_eval.api.registry import metric_registry
from lm_eval.api.samplers import ContextSampler
from lm_eval.tasks._yaml_loader import load_yaml

from bench.data.hub import unreachable_error
from bench.errors import UserError
from bench.evaluation.task_packages import missing_package
from bench.evaluation.task_planning import (
    Splits,
    TaskDefinition,
    evaluated_split,
    included_files,
    task_code_errors,
)
from bench.evaluation.text.task_index import FILES

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from bench.evaluation.text.task_index import Leaf
    from bench.schema import BenchmarkConfig


def read_definition(leaf: Leaf, *, trust_code: bool = False) -> TaskDefinition:
    """Return the definition of a task with its includes merged and its functions imported.

    Raises:
        UserError: the task executes generated code, needs images or a package that is not
            installed, or is a user's own and has code that is not trusted.
        Unreachable: its functions load data from the hub on import.
    """
    name, file = leaf.task_name, leaf.entry.yaml_path
    if file is None:  # Defined inside its group.
        return {**leaf.overrides}
    # Checked before functions are resolved: resolving imports the task's Python modules.
    plain = {**load_yaml(file, resolve_func=False), **leaf.overrides}
    if plain.get("unsafe_code"):
        raise unsafe_code_error(name)
    if plain.get("doc_to_image") or plain.get("doc_to_audio"):
        raise multimodal_error(name)
    if not trust_code:
        _refuse_foreign_code(name, file, plain)
    try:
        with task_code_errors("lm-eval", name):
            definition: TaskDefinition = {**load_yaml(file), **leaf.overrides}
    except ImportError as error:
        raise missing_package("lm_eval", name, error) from error
    except OSError as error:
        raise unreachable_error(f"data loaded by {file.name}", error) from error
    return definition


def read_micro_definition(file: Path) -> TaskDefinition:
    """Read one of our files; its include is relative to the harness's folder."""
    # lm-eval resolves includes relative to the including file, but the folder of lm-eval is known
    # only at run time, so the include is removed and merged here.
    ours: TaskDefinition = load_yaml(file, recursive=False)
    theirs: TaskDefinition = load_yaml(FILES.harness_folder / ours.pop("include"))
    return {**theirs, **ours}


def _refuse_foreign_code(name: str, file: Path, definition: TaskDefinition) -> None:
    """Raise if a task outside the harness would run code other than the harness's.

    Raises:
        UserError: a file names a Python function, or the task a metric that is fetched with its
            code.
    """
    harness = FILES.harness_folder.resolve()
    foreign = [each for each in included_files(file) if not each.is_relative_to(harness)]
    for each in foreign:
        events = yaml.parse(each.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if any(getattr(event, "tag", None) == "!function" for event in events):
            raise _untrusted(name, f"{each.name} names Python code (!function)")
    if not foreign:
        return
    for metric in definition.get("metric_list") or ():
        wanted = str(metric.get("metric"))
        computed = definition.get("process_results") is not None
        if metric.get("hf_evaluate") or not (computed or wanted in metric_registry):
            raise _untrusted(name, f"its metric {wanted!r} is fetched from the hub with its code")


def _untrusted(name: str, reason: str) -> UserError:
    return UserError(
        f"task {name!r} of benchmark.include: {reason}, which runs only with "
        "benchmark.trust_code=true in this command, if you trust it"
    )


def unsafe_code_error(task: str) -> UserError:
    """Build the error for a task that executes generated code."""
    return UserError(
        f"task {task!r} executes generated code, which slimbench refuses: remove it from "
        "benchmark.tasks"
    )


def multimodal_error(task: str) -> UserError:
    """Build the error for a task of lm-eval about images or audio."""
    return UserError(
        f"task {task!r} needs images or audio; lm_eval benchmarks are text only: for images use a "
        "task of benchmark=lmms_eval, on your own rows with benchmark.data"
    )


def with_shots(
    definition: TaskDefinition, benchmark: BenchmarkConfig, chain: list[str]
) -> TaskDefinition:
    """Return a task's definition with the number of shots that the benchmark gives it.

    `chain` is the task's name followed by those of the groups around it, innermost first.

    Raises:
        UserError: the task's own number is not one, or the benchmark's does not fit the task.
    """
    own = definition.get("num_fewshot")
    if own is not None and (type(own) is not int or own < 0):
        raise UserError(
            f"task {chain[0]!r}: num_fewshot={own!r} in its file: a whole number from 0 on is "
            "needed"
        )
    shots = _num_shots(own, benchmark, chain)
    # A Python class has its own settings; see `set_shots`.
    return definition if "class" in definition else {**definition, "num_fewshot": shots}


def set_shots(task: Task, benchmark: BenchmarkConfig, chain: list[str]) -> None:
    """Set the number of shots of a built task; see `with_shots` for `chain`.

    Raises:
        UserError: the task's data have fewer examples.
    """
    shots = _num_shots(task.get_config("num_fewshot"), benchmark, chain)
    # Task classes of Python may draw their examples in another way.
    sampler = getattr(task, "sampler", None)
    if shots and isinstance(sampler, ContextSampler):
        indices = sampler.fewshot_indices
        available = len(indices) if indices else len(sampler.df)
        # lm-eval leaves the scored document out of its own examples.
        shared = task.fewshot_cfg.split == task.config.test_split
        if shots > available - shared:
            raise UserError(
                f"task {chain[0]!r}: num_fewshot={shots}, but its data have {available - shared} "
                f"examples for a question: set benchmark.num_fewshot.{chain[0]} to at most that"
            )
    task.set_config("num_fewshot", shots)


def refuse_absent_examples(name: str, definition: TaskDefinition, data: Splits) -> None:
    """Raise if the split of a task's few-shot examples does not exist."""
    # Otherwise they would come from the scored split, as with local files that have no other.
    split = definition.get("fewshot_split")
    if definition["num_fewshot"] and split is not None and split not in data:
        raise UserError(
            f"task {name!r}: its data have no fewshot_split={split}, only {', '.join(data)}: "
            f"change it, or set benchmark.num_fewshot.{name}=0"
        )


def _num_shots(own: int | None, benchmark: BenchmarkConfig, chain: list[str]) -> int:
    """Return a task's number of shots by the harness's rule."""
    requested = _requested_shots(benchmark, chain, own)
    # A task that declares 0 shots keeps them, as in lm-eval, because its prompt is for zero shots.
    return int(own or 0) if own == 0 or requested is None else requested


def _requested_shots(benchmark: BenchmarkConfig, chain: list[str], own: int | None) -> int | None:
    """Return the number of shots that a benchmark sets for a task; None keeps the task's own.

    Raises:
        UserError: shots are set for a task by name, but its prompt is written for none.
    """
    shots = benchmark.num_fewshot
    if not isinstance(shots, Mapping):
        return shots
    named = next((name for name in chain if name in shots), None)
    if named is None:
        return None
    if own == 0 and named == chain[0] and shots[named]:
        raise UserError(
            f"benchmark.num_fewshot.{named}={shots[named]}: the prompt of this task is written for "
            "zero shots, and lm-eval keeps it so: leave it out"
        )
    return shots[named]


def restrict_to_splits(definition: TaskDefinition, present: set[str]) -> TaskDefinition:
    """Return the definition with only the splits in `present`.

    If only the scored split is left for few-shot examples, it is declared as the test split,
    because only there the harness excludes the scored document from its own examples. A task that
    has no other split itself does not change.
    """
    scored = evaluated_split(definition)
    keys = ("training_split", "validation_split", "test_split", "fewshot_split")
    kept = {key: name if (name := definition.get(key)) in present else None for key in keys}
    examples = dict(definition.get("fewshot_config") or {})
    if examples.get("split") not in present:
        examples.pop("split", None)
    own = {*(definition.get(key) for key in keys)} - {None, scored}
    left = {*kept.values(), examples.get("split")} - {None, scored}
    if own and not left and "samples" not in examples:
        kept = dict.fromkeys(keys) | {"test_split": scored, "fewshot_split": scored}
    return {**definition, **kept, "fewshot_config": examples or None}
