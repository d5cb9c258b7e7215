"""Task definitions: read from the harness's files or ours, restricted to the splits at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.tasks._yaml_loader import load_yaml

from bench.data.hub import unreachable
from bench.errors import UserError
from bench.evaluation.text.catalog import MICRO, harness_folder


def read(file: Path) -> dict[str, Any]:
    """Return a definition with its includes merged and its functions imported.

    Raises:
        UserError: the task executes generated code, or needs a package that is not installed.
        Unreachable: its functions load data from the hub on import.
    """
    if file.parent == MICRO:
        return _read_ours(file)
    # Checked before functions are resolved: resolving imports the task's Python modules.
    if load_yaml(file, resolve_func=False).get("unsafe_code"):
        raise UserError(f"{file.stem} executes generated code, which slimbench refuses")
    try:
        defined: dict[str, Any] = load_yaml(file)
    except ImportError as error:
        raise UserError(f"lm-eval's {file.name} needs a missing package: {error}") from error
    except OSError as error:
        raise unreachable(f"data loaded by {file.name}", error) from error
    return defined


def _read_ours(file: Path) -> dict[str, Any]:
    """Read one of our files; its include is relative to the harness's folder."""
    # lm-eval resolves includes relative to the including file, and where lm-eval is installed is
    # known at run time only; so the include is taken out and merged here.
    ours: dict[str, Any] = load_yaml(file, recursive=False)
    theirs: dict[str, Any] = load_yaml(harness_folder() / ours.pop("include"))
    return {**theirs, **ours}


def shots(defined: dict[str, Any], wanted: int | None) -> int:
    """Return a task's number of shots by the harness's rule."""
    # A task that declares 0 shots stays at 0, as in lm-eval: its prompt is written for zero shots.
    own = defined.get("num_fewshot")
    return int(own or 0) if own == 0 or wanted is None else wanted


def evaluated_split(defined: dict[str, Any]) -> str:
    """Return the split that the harness scores: test if the task has one, else validation."""
    return str(defined.get("test_split") or defined.get("validation_split"))


def restrict(defined: dict[str, Any], present: set[str]) -> dict[str, Any]:
    """Return the definition with only the splits in `present`.

    If nothing else is left to draw few-shot examples from, they come from the scored split. It is
    then declared as the test split, because only there does the harness exclude the scored document
    from its own examples.
    """
    scored = evaluated_split(defined)
    keys = ("training_split", "validation_split", "test_split", "fewshot_split")
    kept = {key: name if (name := defined.get(key)) in present else None for key in keys}
    examples = dict(defined.get("fewshot_config") or {})
    if examples.get("split") not in present:
        examples.pop("split", None)
    if not {*kept.values(), examples.get("split")} - {None, scored} and "samples" not in examples:
        kept = dict.fromkeys(keys) | {"test_split": scored, "fewshot_split": scored}
    return {**defined, **kept, "fewshot_config": examples or None}
