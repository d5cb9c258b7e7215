"""Rebuild the config and the model of a recorded run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from bench import plugins
from bench.config.overrides import Overrides, text_of
from bench.data.digests import library_version
from bench.errors import UserError
from bench.runner.identity import method_identity
from bench.runner.inputs import resolve_calibration_inputs
from bench.runner.method_application import apply_methods
from bench.ui import Progress, warn

if TYPE_CHECKING:
    from pathlib import Path

    from bench.config.run_config import RunConfig
    from bench.models.model import Model
    from bench.records import Record, Store
    from bench.records.record import JsonObject
    from bench.runner.session import Session

REMOTE_CODE = "model.trust_remote_code"
TASK_CODE = "benchmark.trust_code"
REPEATABLE_KEYS = ("packages", "hydra.searchpath", REMOTE_CODE, TASK_CODE, "model.path")
"""Keys of a record that the user must allow again; a model path is checked by the fingerprint of
its weights."""
_GROUP_NAME = re.compile(r"\w[\w.+-]*")


def rebuild_model(
    record: Record, store: Store, session: Session, allowed: Sequence[str] = ()
) -> Model:
    """Return the model of a record: the network that the run kept, or else rebuilt by its methods.

    Raises:
        UserError: the weights, the calibration inputs or the kept network have changed since the
            run, or the run used code that is not `allowed`; see `recorded_config`.
    """
    from bench.device.devices import seed_everything, set_threads
    from bench.models.source import resolve_model

    config = recorded_config(record, allowed)
    source = resolve_model(config.model, offline=config.offline)
    refuse_change("weights", record.model.fingerprint, source.fingerprint)
    recorded = (record.provenance.get("identity") or {}).get("files", {})
    for name, content in source.files.items():
        refuse_change(f"file {name}", recorded.get(name, content), content)
    inputs = resolve_calibration_inputs(config)
    for name, current in inputs.fingerprints.items():
        if current is not None:
            refuse_change(name, record.provenance.get(name), current)
    # Same order as in a run: threads, seed, load, apply. Methods may draw from the global
    # generator, and the number of threads affects the order of summation.
    set_threads(config.threads)
    seed_everything(config.seed)
    model = session.base_model.acquire(source, will_change=bool(config.method))
    kept = store.weights(record)
    if kept is None:
        apply_methods(config, model, inputs.prepare(config, model, Progress()), session)
    else:
        _load_kept_weights(model, kept, record)
    return model


def _load_kept_weights(model: Model, folder: Path, record: Record) -> None:
    """Replace the network of a model by the one that a run kept."""
    from bench.models.classifiers.serialization import load_classifier_folder
    from bench.models.hashing import network_hash

    cure = "remove the folder, so that the run's methods are applied again"
    try:
        network = load_classifier_folder(folder)
    except UserError as error:
        raise UserError(f"{error}; {cure}") from error
    # Files of a classifier are read as float32.
    dtype = next(model.network.parameters()).dtype
    model.network = network.to(model.device, dtype)
    model.invalidate_structure()
    if network_hash(model.network) != record.kept_weights:
        raise UserError(f"{folder} is not the network that run {record.id} kept: {cure}")


def refuse_other_network(record: Record, model: Model, allowed: Sequence[str] = ()) -> None:
    """Raise if a model that was made again is not the one that a run scored, to the last bit.

    Where versions or the machine have changed, or kernels have no fixed order, it may differ in the
    last bits and is only warned of. Records of before weights were hashed are not checked.
    """
    from bench.models.hashing import network_hash

    scored = record.provenance.get("network")
    if scored is None or network_hash(model.network) == scored:
        return
    methods = recorded_config(record, allowed).method
    recorded = (record.provenance.get("identity") or {}).get("methods", {})
    for name, method in methods.items():
        if recorded.get(name) != method_identity(method):
            raise UserError(
                f"the code of method {name} changed since run {record.id} and makes other weights "
                "than it scored: run it again, which gives a new id"
            )
    changed = list(environment_changes(record))
    if model.device.type == "cpu" and not changed:
        raise UserError(
            f"{' + '.join(methods)} makes other weights than run {record.id} scored, from the same "
            "inputs: a method may draw from context.seed only, and keep nothing between runs"
        )
    reason = ", ".join(changed) or f"no fixed order of sums on {model.device.type}"
    warn(
        f"the weights are not to the last bit those that run {record.id} scored ({reason}): "
        f"bench verify {record.id} compares what they answer"
    )


def environment_changes(record: Record) -> Iterator[str]:
    """Yield the differences between the run's environment and this one."""
    from bench.device.devices import describe_device

    for name, was in record.environment.get("versions", {}).items():
        now = library_version(name)
        if was != now:
            yield f"{name} was {was} and is {now}"
    for name, fact in describe_device().items():
        was = record.environment.get(name)
        if was != fact:
            yield f"{name} was {was} and is {fact}"


def recorded_config(record: Record, allowed: Sequence[str] = ()) -> RunConfig:
    """Return the config of a recorded run, with methods as objects.

    A record stores names and knobs of methods; the config tree maps a name to its class. A record
    is untrusted, so it cannot permit any code to run: `allowed` are the overrides of
    `REPEATABLE_KEYS` that the user gives.

    Raises:
        UserError: the run used packages, a search path or a model's own code that the user has not
            allowed, or its config is not valid.
    """
    from bench.config.composition import compose_run_config
    from bench.config.run_config import validate

    given = _repeated(allowed)
    knobs, stored_model = record.config.get("method", {}), dict(record.config.get("model", {}))
    for name in knobs:
        if not _GROUP_NAME.fullmatch(name):
            raise UserError(
                f"run {record.id} has a method {name!r}, which cannot be the name of a config"
            )
    _refuse_unsaid(record, given)
    # The run's benchmark replaces the default one as a whole, because their keys may differ.
    texts = [text_of(each) for each in given.parsed if each.key_or_group != TASK_CODE]
    base = compose_run_config([f"method=[{','.join(knobs)}]", *texts])
    methods = {}
    for name, method in base.method.items():
        kind = type(method)
        target = {"_target_": f"{kind.__module__}.{kind.__qualname__}"}
        methods[name] = {**knobs[name], **target}
    stored_model["trust_remote_code"] = base.model.trust_remote_code
    stored_model["allow_remote_code"] = base.model.trust_remote_code and _is_listed(
        record, stored_model, given
    )
    path = given.value("model.path")
    if path is not None:
        stored_model["path"] = path
    benchmark = {**record.config["benchmark"], "trust_code": given.is_true(TASK_CODE)}
    chosen = {
        "method": methods,
        "model": stored_model,
        "benchmark": benchmark,
        "packages": list(base.packages),
    }
    return validate({**record.config, **chosen})


def _repeated(allowed: Sequence[str]) -> Overrides:
    given = Overrides.parse(allowed)
    for override in given.parsed:
        if override.key_or_group not in REPEATABLE_KEYS or override.is_sweep_override():
            keys = ", ".join(REPEATABLE_KEYS)
            raise UserError(
                f"{text_of(override)} is not allowed, because a recorded run is repeated as it "
                f"was: use only {keys}"
            )
    return given


def _refuse_unsaid(record: Record, given: Overrides) -> None:
    """Raise if the run used code that this command does not allow; the message says how to."""
    unsaid = []
    packages = given.value("packages")
    stored = list(map(str, record.config.get("packages") or ["methods"]))
    said = packages if isinstance(packages, list) else ()
    # Packages of plug-ins are trusted: they are installed, or listed in the user's project.
    if not set(stored) <= {"methods", *said, *plugins.active().packages}:
        unsaid.append(f"packages=[{','.join(stored)}]")
        # Third-party methods are found only with the search path of the run.
        with suppress(UserError, ValueError):
            command = Overrides.parse(shlex.split(record.command)[2:])
            unsaid += command.setting("hydra.searchpath")
    model = record.config.get("model", {})
    if model.get("trust_remote_code") and not given.is_true(REMOTE_CODE):
        unsaid.append(f"{REMOTE_CODE}=true")
        if model.get("path") is not None:
            unsaid.append(f"model.path={model['path']}")
    if record.config["benchmark"].get("trust_code") and not given.is_true(TASK_CODE):
        unsaid.append(f"{TASK_CODE}=true")
    if unsaid:
        raise UserError(
            f"run {record.id} used {', '.join(unsaid)}, which no record can allow: if you trust "
            f"it, add {shlex.join(unsaid)} to this command"
        )


def _is_listed(record: Record, model: JsonObject, given: Overrides) -> bool:
    """Return whether the config tree lists the model's repository as one whose code may run."""
    from bench.config.composition import compose_run_config

    if not _GROUP_NAME.fullmatch(str(model.get("name"))):
        return False
    if model.get("path") is not None and given.value("model.path") is None:
        raise UserError(
            f"run {record.id} read the code of its model from {model['path']}: if you trust that "
            "code, add model.path=FOLDER to this command"
        )
    listed = compose_run_config(
        [f"model={model['name']}", *given.setting("hydra.searchpath")]
    ).model
    return listed.allow_remote_code and listed.source == model.get("source")


def refuse_change(name: str, recorded: object, current: object) -> None:
    """Raise if the fingerprint of an input differs from the recorded one."""
    if recorded != current:
        raise UserError(f"the {name} changed since the run, so it cannot be repeated")


def refuse_changed_data(config: RunConfig, record: Record, session: Session) -> None:
    """Raise if a task's documents differ from those that the run scored."""
    # The benchmark of the run and not a limited one, so that fingerprints are comparable.
    planned = session.benchmarks.plan(config.benchmark, offline=config.offline)
    for name, source in record.provenance.get("data", {}).items():
        refuse_change(f"data of {name}", source.get("fingerprint"), planned.fingerprints.get(name))
