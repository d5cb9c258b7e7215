"""All that a run reads, found and fingerprinted; its id."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.runner.calibration_inputs import CalibrationInputs, resolve_calibration_inputs

if TYPE_CHECKING:
    from bench.config.run_config import RunConfig
    from bench.evaluation import PlannedBenchmark
    from bench.models.source import ModelSource

LIBRARIES = ("slimbench", "torch", "transformers", "lm-eval", "lmms-eval")


def check_run(config: RunConfig) -> list[Path] | None:
    """Refuse a run that cannot work, before anything is loaded or written.

    Returns the files that decide the run; None if data on a hub, which may change, do too.
    """
    from bench.records import Store

    Store(config.results_dir).ensure_writable()
    inputs = resolve_run(config)
    return None if inputs.may_change(config) else inputs.files(config)


@dataclass(frozen=True)
class RunInputs:
    """Everything that a run reads, found and fingerprinted, with no weights loaded yet."""

    id: str
    source: ModelSource
    plan: PlannedBenchmark
    loan: CalibrationInputs
    versions: dict[str, str]

    def may_change(self, config: RunConfig) -> bool:
        """Return whether the hub could return different data next time."""
        if config.offline:
            return False
        from_hub = [source.origin == "hub" for source in self.plan.sources.values()]
        # A model is fixed only if the config names the commit itself; a branch such as main may
        # move.
        from_hub.append(self.source.revision not in (None, config.model.revision))
        return any(from_hub) or self.loan.may_change(config)

    def files(self, config: RunConfig) -> list[Path]:
        """Return the model's folder, and every file or folder that the config names."""
        # Any text of the config may be a path (a method's settings folder, local data), so all that
        # exist count. A file by any name, a folder only if written as a path: "digits" is a data
        # set.
        named = set(_string_leaves(_plain_config(config))) - {str(config.results_dir)}
        found = [text for text in named if os.path.isfile(text) or "/" in text]  # noqa: PTH113
        return [self.source.folder, *map(Path, sorted(filter(os.path.exists, found)))]


def resolve_run(config: RunConfig) -> RunInputs:
    """Find model files and data, let every method check the model, and name the run.

    Raises:
        UserError: a method does not fit the model, or a required input is missing.
    """
    from bench.device.devices import select_device, select_dtype
    from bench.evaluation import plan_once
    from bench.models import loading
    from bench.models import source as model_source
    from bench.models.structure.model_structure import inspect_model
    from bench.records import run_id

    source = model_source.resolve_model(config.model, offline=config.offline)
    skeleton = loading.skeleton(source)
    if config.costs.measure:
        from bench.measurement.workload import refuse_long_prompts

        refuse_long_prompts(config.costs.timing, config.model, skeleton)
    structure = inspect_model(skeleton)
    for method in config.method.values():
        method.check(structure)
    planned = plan_once(config.benchmark, offline=config.offline)
    planned.check_model(config.model)
    loan = resolve_calibration_inputs(config)

    identity = config.identity()
    device = select_device(config.model.device)
    # `auto` and `cuda` are resolved first: the id must say on which kind of device and in which
    # dtype the numbers were computed.
    identity["model"] |= {
        "device": device.type,
        "dtype": str(select_dtype(config.model.dtype, device)).removeprefix("torch."),
    }
    found = library_versions()
    inputs = {
        "config": identity,
        "weights": source.fingerprint,
        "data": planned.fingerprints,
        **loan.fingerprints,
        "versions": found,
    }
    return RunInputs(run_id(inputs), source, planned, loan, found)


def _plain_config(config: RunConfig) -> dict[str, Any]:
    """Return the config as JSON values, each method with its knobs."""
    plain: dict[str, Any] = config.model_dump(mode="json", exclude={"method"})
    plain["method"] = {name: m.model_dump(mode="json") for name, m in config.method.items()}
    return plain


def _string_leaves(node: Any) -> Iterator[str]:
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
