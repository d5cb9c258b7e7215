"""Inputs of a run: found, fingerprinted, and hashed into its id; no weight is loaded."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import UserError
from bench.records import Store, run_id
from bench.runner.calibration_inputs import CalibrationInputs, resolve_calibration_inputs
from bench.runner.identity import (
    class_identity,
    method_identity,
    model_files_identity,
    scoring_code_identity,
)

if TYPE_CHECKING:
    from bench.config.run_config import RunConfig
    from bench.evaluation import PlannedBenchmark
    from bench.models.source import ModelSource
    from bench.runner.session import Session

LIBRARIES = ("slimbench", "torch", "transformers", "lm-eval", "lmms-eval")


def check_run(config: RunConfig, session: Session) -> list[Path] | None:
    """Refuse a run that cannot work, before anything is loaded or written.

    Returns the files that decide the run; None if data on a hub, which may change, do too.
    """
    Store(config.results_dir).ensure_writable()
    inputs = resolve_run(config, session)
    return None if inputs.may_change(config) else inputs.files(config)


@dataclass(frozen=True)
class RunInputs:
    """Everything that a run reads, found and fingerprinted, with no weights loaded yet."""

    id: str
    source: ModelSource
    benchmark: PlannedBenchmark
    calibration_inputs: CalibrationInputs
    versions: dict[str, str]
    identity: dict[str, object]
    """Parts of the id besides the config, by name."""

    def may_change(self, config: RunConfig) -> bool:
        """Return whether the hub could return different data next time."""
        if config.offline:
            return False
        from_hub = [source.origin == "hub" for source in self.benchmark.sources.values()]
        # A model is fixed only if the config names the commit itself; a branch such as main may
        # move.
        from_hub.append(self.source.revision not in (None, config.model.revision))
        adapter = (config.model.adapter or "").partition("@")[2]
        from_hub.append(self.source.adapter_revision not in (None, adapter))
        return any(from_hub) or self.calibration_inputs.may_change(config)

    def files(self, config: RunConfig) -> list[Path]:
        """Return the model's folder, and every file or folder that the config names."""
        # Any text of the config may be a path (a method's settings folder, local data), so all that
        # exist count. A file by any name, a folder only if written as a path: "digits" is a data
        # set.
        named = set(_string_leaves(config.plain())) - {str(config.results_dir)}
        found = [text for text in named if os.path.isfile(text) or "/" in text]  # noqa: PTH113
        places = [self.source.given, *filter(None, [self.source.adapter])]
        return [*places, *map(Path, sorted(filter(os.path.exists, found)))]


def resolve_run(config: RunConfig, session: Session) -> RunInputs:
    """Find model files and data, let every method check the model, and name the run.

    Raises:
        UserError: a method does not fit the model, or a required input is missing.
    """
    from bench.device.devices import select_device, select_dtype
    from bench.models import loading
    from bench.models.source import resolve_model
    from bench.models.structure.model_structure import inspect_model

    source = resolve_model(config.model, offline=config.offline)
    # Before the methods' own checks, which see the network as it was before it was quantized.
    refuse_quantized(source, config)
    skeleton = loading.skeleton(source)
    if config.costs.measure:
        from bench.measurement.workload import refuse_long_prompts

        refuse_long_prompts(config.costs.timing, config.model, skeleton)
    structure = inspect_model(skeleton)
    for method in config.method.values():
        method.check(structure)
    planned = session.benchmarks.plan(config.benchmark, offline=config.offline)
    planned.check_model(config.model)
    calibration_inputs = resolve_calibration_inputs(config)

    device = select_device(config.model.device)
    versions = library_versions()
    decided = config.identity()
    # `auto` and `cuda` are resolved: the id must say on which kind of device and in which dtype the
    # numbers were computed, and not how that was asked for.
    del decided["model"]["device"], decided["model"]["dtype"]
    identity: dict[str, object] = {
        "device": device.type,
        "dtype": str(select_dtype(config.model.dtype, device)).removeprefix("torch."),
        "weights": source.fingerprint,
        "model": model_files_identity(
            source.folder, remote_code=config.model.trust_remote_code, adapter=source.adapter
        ),
        **({"network": class_identity(config.model.target)} if config.model.target else {}),
        "data": planned.fingerprints,
        **calibration_inputs.fingerprints,
        "methods": {name: method_identity(method) for name, method in config.method.items()},
        "code": scoring_code_identity(),
        "versions": versions,
    }
    run = run_id({"config": decided, **identity})
    return RunInputs(run, source, planned, calibration_inputs, versions, identity)


def refuse_quantized(source: ModelSource, config: RunConfig) -> None:
    """Raise if a method would change weights that are quantized already."""
    if source.quantization is None:
        return
    for name, method in config.method.items():
        if method.changes_weights:
            raise UserError(
                f"method={name} changes dense weights, and those of model {config.model.name} are "
                f"quantized by {source.quantization.method}: leave the method out, or give the "
                "checkpoint that was quantized"
            )


def _string_leaves(node: object) -> Iterator[str]:
    """Yield every string in a tree of JSON values."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from _string_leaves(inner)


@functools.cache
def library_versions() -> dict[str, str]:
    """Return the library versions that are part of a run's id."""
    # Cached: imported libraries keep their version even if the installation changes meanwhile.
    return {name: version(name) for name in LIBRARIES}
