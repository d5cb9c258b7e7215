"""Task definitions: reading the harness's or ours, and restricting one to the splits there are."""

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
        UserError: the task runs code that the model wrote, or needs a package that is not here.
        Unreachable: its functions load something from the hub when they are imported.
    """
    if file.parent == MICRO:
        return _read_ours(file)
    if load_yaml(file, resolve_func=False).get("unsafe_code"):
        raise UserError(f"{file.stem} runs code that the model wrote; bench does not do that")
    try:
        defined: dict[str, Any] = load_yaml(file)
    except ImportError as error:
        raise UserError(f"the harness's {file.name} needs a package: {error}") from error
    except OSError as error:
        raise unreachable(f"what {file.name} loads", error) from error
    return defined


def _read_ours(file: Path) -> dict[str, Any]:
    """Resolve the include against the harness's folder, which is known at run time only."""
    ours: dict[str, Any] = load_yaml(file, recursive=False)
    theirs: dict[str, Any] = load_yaml(harness_folder() / ours.pop("include"))
    return {**theirs, **ours}


def shots(defined: dict[str, Any], wanted: int | None) -> int:
    """Return a task's number of shots as the harness decides it: its own 0 cannot be changed."""
    own = defined.get("num_fewshot")
    return int(own or 0) if own == 0 or wanted is None else wanted


def evaluated_split(defined: dict[str, Any]) -> str:
    """Return the split that the harness scores: test if there is one, else validation."""
    return str(defined.get("test_split") or defined.get("validation_split"))


def restrict(defined: dict[str, Any], present: set[str]) -> dict[str, Any]:
    """Return the definition with only the splits that are there.

    With nothing else to draw few-shot examples from, they come from the scored split. It is then
    declared as the test split, because only there does the harness leave the scored question
    itself out of its own examples.
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
