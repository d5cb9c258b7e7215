"""Find and fingerprint the inputs of a run, and compute its id, without loading weights."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import UserError
from bench.records import run_id
from bench.records.files import refuse_unwritable
from bench.runner.identity import (
    class_identity,
    library_versions,
    method_files,
    method_identity,
    place_named,
    scoring_code_identity,
    string_leaves,
)
from bench.runner.method_application import refuse_idle, refuse_impossible_order

if TYPE_CHECKING:
    from torch import nn

    from bench.config.run_config import RunConfig
    from bench.data.calibration import CalibrationSource
    from bench.data.prompts import PromptSource
    from bench.evaluation import PlannedBenchmark
    from bench.method import Context
    from bench.models.model import Model
    from bench.models.source import ModelSource
    from bench.models.vlm.image_processing import ImageSettings
    from bench.runner.session import Session
    from bench.ui import Progress


def check_run(config: RunConfig, session: Session) -> list[Path] | None:
    """Raise if a run cannot work, before anything is loaded or written.

    Return the files on which the run depends, or None if it also depends on data of a hub, which
    may change.
    """
    refuse_unwritable("results_dir", config.results_dir, folder=True)
    inputs = resolve_run(config, session)
    return None if inputs.may_change(config) else inputs.files(config)


@dataclass(frozen=True)
class CalibrationInputs:
    """Fingerprinted calibration text and prompts of a run; None if no method uses them."""

    calibration: CalibrationSource | None = None
    prompts: PromptSource | None = None

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """Hashes of the inputs, in the form stored in records."""
        return {
            "calibration": self.calibration.fingerprint if self.calibration else None,
            "prompts": self.prompts.fingerprint if self.prompts else None,
        }

    def may_change(self, config: RunConfig) -> bool:
        """Return whether the hub could return different data next time."""
        text = self.calibration and config.calibration.source in ("wikitext2", "c4")
        return bool(text or (self.prompts and config.prompts.source == "hub"))

    def prepare(
        self, config: RunConfig, model: Model, progress: Progress, folder: Path | None = None
    ) -> Context:
        """Encode the inputs with a loaded model's tokenizer and processor."""
        from bench.method import Context

        text, prompts = self.calibration, self.prompts
        system = config.model.system_prompt
        return Context(
            seed=config.seed,
            calibration=text.tokenize(model.tokenizer) if text else None,
            prompts=prompts.process(model.processor, system) if prompts else None,
            progress=progress,
            folder=folder,
        )


@dataclass(frozen=True)
class RunInputs:
    """Everything that a run reads, found and fingerprinted, before weights are loaded."""

    id: str
    source: ModelSource
    benchmark: PlannedBenchmark
    calibration_inputs: CalibrationInputs
    versions: dict[str, str]
    identity: dict[str, object]
    """Parts of the id other than the config, by name."""

    def may_change(self, config: RunConfig) -> bool:
        """Return whether the hub could return different data next time."""
        if config.offline:
            return False
        from_hub = [source.origin == "hub" for source in self.benchmark.sources.values()]
        # A model cannot change only if the config names a commit; a branch such as main may move.
        from_hub.append(self.source.revision not in (None, config.model.revision))
        adapter = (config.model.adapter or "").partition("@")[2]
        from_hub.append(self.source.adapter_revision not in (None, adapter))
        return any(from_hub) or self.calibration_inputs.may_change(config)

    def files(self, config: RunConfig) -> list[Path]:
        """Return the folders of model and tasks, and the files that config and methods name."""
        # Any string of the config may be a path (a method's settings folder, local data), so all
        # existing ones are included.
        named = set(string_leaves(config.plain())) - {str(config.results_dir)}
        found = set(filter(None, map(place_named, named)))
        code = {file for method in config.method.values() for file in method_files(method)}
        model = [self.source.given, *filter(None, [self.source.adapter])]
        return [*model, *sorted(found | code | self.benchmark.folders)]


def resolve_run(config: RunConfig, session: Session) -> RunInputs:
    """Find model files and data, let every method check the model, and compute the run's id.

    Raises:
        UserError: a method, the tokenizer or the benchmark does not fit the model, or a required
            input is missing.
    """
    from bench.models import loading
    from bench.models.source import resolve_model

    source = resolve_model(config.model, offline=config.offline)
    skeleton = loading.skeleton(source)
    if config.costs.measure:
        from bench.measurement.workload import refuse_long_prompts

        refuse_long_prompts(config.costs.timing, config.model, skeleton)
    # What a method prints is none of a command's results, which may be JSON.
    with redirect_stdout(sys.stderr):
        _check_methods(config, source, skeleton)
    planned = session.benchmarks.plan(config.benchmark, offline=config.offline)
    planned.check_model(config.model)
    calibration_inputs = resolve_calibration_inputs(config)
    tokenizer = None
    if config.model.kind != "image_classifier":
        tokenizer = loading.load_tokenizer(source)
        loading.check_tokenizer(config.model, tokenizer, skeleton)
        if calibration_inputs.calibration is not None:
            calibration_inputs.calibration.check(tokenizer)
    planned.harness.check_network(config.model, skeleton, tokenizer)

    versions = library_versions(config, source.quantization)
    identity: dict[str, object] = {
        **_device_and_dtype(config),
        "weights": source.fingerprint,
        "files": {**source.files, **replaced_modules_identity(skeleton)},
        **_own_network(config),
        **_images_as_pixels(source),
        "tasks": planned.definitions,
        "data": planned.fingerprints,
        **calibration_inputs.fingerprints,
        "methods": {name: method_identity(method) for name, method in config.method.items()},
        "code": scoring_code_identity(),
        "versions": versions,
    }
    decided = config.identity()
    # The id has the resolved kind of device and dtype instead of settings such as `auto` or `cuda`.
    del decided["model"]["device"], decided["model"]["dtype"]
    run = run_id({"config": decided, **identity})
    return RunInputs(run, source, planned, calibration_inputs, versions, identity)


def _device_and_dtype(config: RunConfig) -> dict[str, str]:
    """Return the kind of device and the dtype that the settings resolve to."""
    from bench.device.devices import select_device, select_dtype

    device = select_device(config.model.device)
    dtype = select_dtype(config.model.dtype, device)
    return {"device": device.type, "dtype": str(dtype).removeprefix("torch.")}


def _check_methods(config: RunConfig, source: ModelSource, skeleton: nn.Module) -> None:
    """Raise if a method does not fit the model, its kind, or the methods before it."""
    from bench.models.replaced_modules import weight_forms
    from bench.models.structure.model_structure import inspect_model

    structure = inspect_model(skeleton)
    # Before the checks of the methods, which get the structure of the unquantized network.
    forms = {"prequantized"} if source.quantization else set()
    if source.is_described or source.quantization:
        forms |= weight_forms(skeleton)
    refuse_impossible_order(config, forms)
    for name, method in config.method.items():
        method.check(structure)
        refuse_idle(name, method, structure)
    if config.uses_prompts and config.model.kind != "image_text":
        names = [name for name, method in config.method.items() if method.uses_prompts]
        raise UserError(
            f"method={names[0]} needs a vision-language model, but model={config.model.name} is of "
            f"kind {config.model.kind}: choose a model of kind image_text, such as micro_llava"
        )


def _own_network(config: RunConfig) -> dict[str, str]:
    """Return the identity of the network's class if it is defined by the user."""
    from hydra.utils import get_class

    target = config.model.target
    return {} if target is None else {"network": class_identity(get_class(target))}


def _images_as_pixels(source: ModelSource) -> dict[str, ImageSettings]:
    """Return the effective settings of the processor, including defaults that no config states."""
    from bench.models import loading

    if source.config.kind != "image_text":
        return {}
    return {"images": loading.image_settings(source)}


def replaced_modules_identity(skeleton: nn.Module) -> dict[str, str]:
    """Return the identities of module classes of methods or plug-ins in an exported model."""
    from bench.models.replaced_modules import ReplacedModule

    kinds = {type(module) for module in skeleton.modules() if isinstance(module, ReplacedModule)}
    return {f"class {kind.__module__}.{kind.__qualname__}": class_identity(kind) for kind in kinds}


def resolve_calibration_inputs(config: RunConfig) -> CalibrationInputs:
    """Find the calibration inputs that a run's methods use.

    Raises:
        MissingData: the inputs are neither on this machine nor reachable.
        UserError: the content of the inputs is not as required.
    """
    from bench.data import calibration, prompts

    text = prompted = None
    # Only inputs that a method reads, so that a dense run neither depends on them nor fails without
    # them.
    if config.uses_calibration:
        text = calibration.resolve_calibration(config.calibration, offline=config.offline)
    if config.uses_prompts:
        prompted = prompts.resolve_prompts(config.prompts, offline=config.offline)
    return CalibrationInputs(text, prompted)
