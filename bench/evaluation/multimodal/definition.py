"""Task definitions: read from lmms-eval's files or ours, with the benchmark's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmms_eval.utils import load_yaml_config
from omegaconf import OmegaConf

from bench.errors import UserError
from bench.evaluation.config import BenchmarkConfig
from bench.evaluation.multimodal.catalog import MICRO, harness_folder

SUBMISSION = "submission"
"""Name of metrics that write a file for a server and have no value."""


def read(file: Path, benchmark: BenchmarkConfig) -> dict[str, Any]:
    """Return a definition with its includes merged and its functions imported.

    Raises:
        UserError: the task needs a package that is not installed, does not decode greedily, or is
            not a generate_until task.
    """
    defined = _with_includes(file)
    _refuse_unsupported(file.stem, defined)
    defined["metric_list"] = [m for m in defined["metric_list"] if m["metric"] != SUBMISSION]
    if not defined["metric_list"]:
        raise UserError(f"task {file.stem!r} only writes a submission file; it has no metric")
    prompts = (defined.get("lmms_eval_specific_kwargs") or {}).get("default", {})
    if "ocr" in prompts:
        prompts["ocr"] = benchmark.ocr_tokens
    return defined


def _with_includes(file: Path) -> dict[str, Any]:
    """Merge includes; those of our files are relative to the harness's folder."""
    if file.parent == MICRO:
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
