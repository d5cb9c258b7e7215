"""A recorded run's config and its model, made again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.errors import UserError

if TYPE_CHECKING:
    from bench.config.run_config import RunConfig
    from bench.models.model import Model
    from bench.records import Record


def rebuild_model(record: Record) -> Model:
    """Return the model of a record, made again from its weights and methods."""
    from bench.device.devices import seed_everything
    from bench.models import loading
    from bench.models import source as model_source
    from bench.runner.calibration_inputs import resolve_calibration_inputs
    from bench.runner.method_application import apply_methods
    from bench.ui import Progress

    config = recorded_config(record)
    source = model_source.resolve_model(config.model, offline=config.offline)
    _refuse_change("weights", record.model.fingerprint, source.fingerprint)
    loan = resolve_calibration_inputs(config)
    for what, found in loan.fingerprints.items():
        if found is not None:
            _refuse_change(what, record.provenance[what], found)
    # Same order as in a run: seed, load, apply. A method that draws from the global generator would
    # otherwise make a different model.
    seed_everything(config.seed)
    model = loading.load_model(source)
    apply_methods(config, model, loan.to(config, model, Progress()))
    return model


def recorded_config(record: Record) -> RunConfig:
    """Return the config of a run as recorded, with methods as objects.

    A record stores names and knobs of methods; the config tree maps a name to its class.
    """
    import shlex

    from bench.config.composition import compose_run_config
    from bench.config.run_config import validate

    knobs = record.config["method"]
    # A third party's methods are found only with the search path that the run was given.
    searched = [w for w in shlex.split(record.command) if w.startswith("hydra.searchpath=")]
    known = compose_run_config([f"method=[{','.join(knobs)}]", *searched]).method
    classes = {name: type(method) for name, method in known.items()}
    targets = {name: f"{kind.__module__}.{kind.__qualname__}" for name, kind in classes.items()}
    methods = {name: {"_target_": targets[name], **knobs[name]} for name in knobs}
    return validate({**record.config, "method": methods})


def _refuse_change(what: str, recorded: str | None, found: str) -> None:
    """Raise if an input differs from what the run read."""
    if recorded != found:
        raise UserError(f"the {what} changed since the run, so it cannot be repeated")
