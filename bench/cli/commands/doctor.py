"""`bench doctor`: installed packages, devices, and what is available offline."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from bench.config.composition import compose_run_config, config_names
from bench.device.devices import describe_device
from bench.errors import UserError
from bench.evaluation import plan
from bench.models.source import resolve_model
from bench.ui import print_rows

PACKAGES = (
    "slimbench", "torch", "torchvision", "transformers", "lm-eval", "lmms-eval", "hydra-core",
    "wandb", "pandas", "datasets", "joblib", "submitit", "ray", "optuna",
)  # fmt: skip


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
    found = describe_device()
    memory = found["memory_bytes"] / 2**30
    cpu = f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads, {memory:.0f} GiB"
    yield _row("device cpu", cpu)
    yield _row("device cuda", ", ".join(found["gpus"]) or None, "no CUDA device")


def _models() -> Iterator[dict[str, str]]:
    for name in config_names("model"):
        try:
            config = compose_run_config([f"model={name}"])
            source = resolve_model(config.model, offline=True)
        except UserError as error:
            yield _row(f"model {name}", None, str(error))
        else:
            yield _row(f"model {name}", f"{source.folder}")


def _benchmarks() -> Iterator[dict[str, str]]:
    for name in config_names("benchmark"):
        try:
            plan(compose_run_config([f"benchmark={name}"]).benchmark, offline=True)
        except UserError as error:
            yield _row(f"benchmark {name}", None, str(error))
        else:
            yield _row(f"benchmark {name}", "all data at hand")


def run_command(given: argparse.Namespace) -> int:
    """`bench doctor`."""
    return print_rows(diagnose(), given.json)
