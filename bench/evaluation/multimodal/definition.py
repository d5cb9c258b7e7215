"""Task definitions: reading the harness's or ours, with the settings that a benchmark has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmms_eval.utils import load_yaml_config
from omegaconf import OmegaConf

from bench.errors import UserError
from bench.evaluation.config import BenchmarkConfig
from bench.evaluation.multimodal.catalog import MICRO, harness_folder

SUBMISSION = "submission"
"""The harness's metrics of this name write a file for a server and have no value."""


def read(file: Path, benchmark: BenchmarkConfig) -> dict[str, Any]:
    """Return a definition with its includes merged and its functions imported.

    Raises:
        UserError: the task needs a package that is not here, samples its answers, or is not one of
            free generation.
    """
    defined = _with_includes(file)
    _refuse_unsupported(file.stem, defined)
    defined["metric_list"] = [m for m in defined["metric_list"] if m["metric"] != SUBMISSION]
    if not defined["metric_list"]:
        raise UserError(f"task {file.stem!r} only writes a file for a server: nothing is scored")
    prompts = (defined.get("lmms_eval_specific_kwargs") or {}).get("default", {})
    if "ocr" in prompts:
        prompts["ocr"] = benchmark.ocr_tokens
    return defined


def _with_includes(file: Path) -> dict[str, Any]:
    """Resolve what our files include against the harness's folder, known at run time only."""
    if file.parent == MICRO:
        ours = {str(key): value for key, value in OmegaConf.load(file).items()}
        return {**_with_includes(harness_folder() / ours.pop("include")), **ours}
    try:
        loaded: dict[str, Any] = load_yaml_config(str(file), mode="full")
    except ImportError as error:
        raise UserError(f"the harness's {file.name} needs a package: {error}") from error
    return loaded


def evaluated_split(defined: dict[str, Any]) -> str:
    """Return the split that the harness scores: test if there is one, else validation."""
    return str(defined.get("test_split") or defined.get("validation_split")).strip()


def _refuse_unsupported(name: str, defined: dict[str, Any]) -> None:
    if defined.get("output_type") != "generate_until" or "class" in defined:
        raise UserError(f"task {name!r} is not one of a question and a generated answer")
    options = defined.get("generation_kwargs") or {}
    beams = int(options.get("num_beams") or 1)
    if options.get("do_sample") or float(options.get("temperature") or 0) > 0 or beams > 1:
        raise UserError(f"task {name!r} samples or searches its answers; bench answers greedily")
