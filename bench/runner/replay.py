"""A recorded run's config and its model, made again."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from bench.config.overrides import Overrides
from bench.errors import UserError
from bench.runner.calibration_inputs import resolve_calibration_inputs
from bench.runner.method_application import apply_methods
from bench.ui import Progress

if TYPE_CHECKING:
    from bench.config.run_config import RunConfig
    from bench.models.model import Model
    from bench.records import Record
    from bench.runner.session import Session


def rebuild_model(record: Record, session: Session) -> Model:
    """Return the model of a record, made again from its weights and methods.

    Raises:
        UserError: the weights or the calibration inputs have changed since the run.
    """
    from bench.device.devices import seed_everything, set_threads
    from bench.models.source import resolve_model

    config = recorded_config(record)
    source = resolve_model(config.model, offline=config.offline)
    refuse_change("weights", record.model.fingerprint, source.fingerprint)
    recorded = (record.provenance.get("identity") or {}).get("files", {})
    for name, content in source.files.items():
        refuse_change(f"file {name}", recorded.get(name, content), content)
    inputs = resolve_calibration_inputs(config)
    for name, found in inputs.fingerprints.items():
        if found is not None:
            refuse_change(name, record.provenance[name], found)
    # Same order as in a run: threads, seed, load, apply. A method that draws from the global
    # generator would otherwise make a different model, and another number of threads adds floats
    # up in another order.
    set_threads(config.threads)
    seed_everything(config.seed)
    model = session.base_model.acquire(source, will_change=bool(config.method))
    apply_methods(config, model, inputs.prepare(config, model, Progress()))
    return model


def recorded_config(record: Record) -> RunConfig:
    """Return the config of a run as recorded, with methods as objects.

    A record stores names and knobs of methods; the config tree maps a name to its class.
    """
    from bench.config.composition import compose_run_config
    from bench.config.run_config import validate

    knobs = record.config["method"]
    # A third party's methods are found only with the search path that the run was given.
    given = Overrides.parse(shlex.split(record.command)[2:])
    searched = given.setting("hydra.searchpath")
    known = compose_run_config([f"method=[{','.join(knobs)}]", *searched]).method
    classes = {name: type(method) for name, method in known.items()}
    targets = {name: f"{kind.__module__}.{kind.__qualname__}" for name, kind in classes.items()}
    methods = {name: {"_target_": targets[name], **knobs[name]} for name in knobs}
    return validate({**record.config, "method": methods})


def refuse_change(name: str, recorded: object, found: object) -> None:
    """Raise if the fingerprint of an input differs from that of what the run read."""
    if recorded != found:
        raise UserError(f"the {name} changed since the run, so it cannot be repeated")
