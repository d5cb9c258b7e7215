"""`bench doctor`: installed packages, devices, and what is available offline."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

import psutil
from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from bench.config.composition import compose_section, config_names
from bench.data import hub
from bench.device.devices import gpu_names, processor_name
from bench.errors import UserError
from bench.evaluation import plan
from bench.models.source import fresh_folder, is_fresh, resolve_model
from bench.schema import HARNESS_BENCHMARKS, BenchmarkConfig, ModelConfig
from bench.security import CONFIG_DIR
from bench.ui import print_rows

PACKAGES = (
    "slimbench", "torch", "torchvision", "transformers", "lm-eval", "lmms-eval", "hydra-core",
    "wandb", "pandas", "datasets", "joblib", "submitit", "ray", "optuna",
)  # fmt: skip


NAMED_BY_USERS = {
    "hub": "model=ORG/NAME",
    "local": "model=./FOLDER",
    "module": "model=module model._target_=PACKAGE.CLASS",
    "torchvision": "model=torchvision/NAME",
}
"""Entries of conf/model that need the name of a model, and how to give it."""


def diagnose() -> list[dict[str, str]]:
    """Return one row per check: `what`, `state` (ok or missing) and `detail`."""
    return [*_packages(), *_devices(), *_models(), *_benchmarks()]


def _row(what: str, detail: str | None, missing: str = "") -> dict[str, str]:
    """Build a row; a `detail` means ok, otherwise `missing` gives the reason."""
    return {"what": what, "state": "ok" if detail else "missing", "detail": detail or missing}


def _packages() -> Iterator[dict[str, str]]:
    for name in PACKAGES:
        try:
            yield _row(f"package {name}", version(name))
        except PackageNotFoundError:
            yield _row(f"package {name}", None, "not installed")


def _devices() -> Iterator[dict[str, str]]:
    memory = psutil.virtual_memory().total / 2**30
    yield _row("device cpu", f"{processor_name()}, {os.cpu_count()} cores, {memory:.0f} GiB")
    yield _row("device cuda", ", ".join(gpu_names()) or None, "no CUDA device")


def _models() -> Iterator[dict[str, str]]:
    yield from _looked_up("model", _find_model)


def _benchmarks() -> Iterator[dict[str, str]]:
    yield from _looked_up("benchmark", _find_data)


def _looked_up(group: str, find: Callable[[str], str]) -> Iterator[dict[str, str]]:
    for name in config_names(group):
        what = f"{group} {name}"
        try:
            yield _row(what, find(name))
        except UserError as error:
            yield _row(what, None, str(error))


def _find_model(name: str) -> str:
    if name in NAMED_BY_USERS:
        return f"is named in the command: {NAMED_BY_USERS[name]}"
    config = _shipped("model", name, ModelConfig)
    # A model with fresh weights needs no file; checking its code would import torch.
    return str(fresh_folder() if is_fresh(config) else resolve_model(config, offline=True).folder)


def _find_data(name: str) -> str:
    if name in HARNESS_BENCHMARKS:
        return "data of the tasks that are named: benchmark.tasks=[NAME,...]"
    config = _shipped("benchmark", name, BenchmarkConfig)
    texts = {text.text for text in config.perplexity.values()}
    if config.harness == "images":
        embedded = config.images.data == "digits"
    else:
        embedded = texts <= {"english"} and (config.suite == "micro" or not config.tasks)
    # Not by planning, because importing a harness takes longer than all other checks together.
    if embedded:
        return "embedded"
    if config.harness != "images" and not hub.has_cached_data_sets():
        raise UserError(
            f"no data set is in the local cache: run `bench prefetch benchmark={name}` with "
            "network access"
        )
    plan(config, offline=True)
    return "all data at hand"


@cache
def _run_settings() -> DictConfig:
    settings = OmegaConf.load(CONFIG_DIR / "config.yaml")
    assert isinstance(settings, DictConfig)
    return settings


Section = TypeVar("Section", ModelConfig, BenchmarkConfig)


def _shipped(group: str, name: str, kind: type[Section]) -> Section:
    """Compose a config of a group alone, which is much faster than the config of a run."""
    # A model with fresh weights uses the seed of the run.
    whole = OmegaConf.merge(_run_settings(), compose_section(group, name))
    content = OmegaConf.to_container(OmegaConf.select(whole, group), resolve=True)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def run_command(given: argparse.Namespace) -> int:
    """`bench doctor`."""
    return print_rows(diagnose(), as_json=given.json)
