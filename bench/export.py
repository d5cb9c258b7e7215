"""`bench export`: the model of a run, as a Hugging Face folder.

Records hold no weights. The run's methods are applied again, with the recorded settings, to the
same weights and the same calibration text; evaluation is skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import UserError

if TYPE_CHECKING:
    from bench.config import RunConfig
    from bench.models.model import Model
    from bench.models.saving import Form
    from bench.records import Record


def export(
    run: str, folder: Path, results_dir: Path, *, pad: bool = False, onnx: bool = False
) -> Form:
    """Write the model of a run to a new folder, atomically, and return its format.

    `run` is a record's id or a prefix of it. `pad` fills experts of different widths up with zeros,
    so that stock transformers loads the folder. `onnx` also writes an image classifier as ONNX.

    Raises:
        UserError: there is no such run, the folder is not empty, the run cannot be repeated because
            its weights, text or methods have changed, or its model cannot be written.
    """
    from bench.models.saving import save
    from bench.records import Store
    from bench.records.atomic import write_folder
    from bench.reporting.card import card

    record = Store(results_dir).get(run)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: choose a different one")
    # The cheap refusals come first: repeating the methods may take hours.
    model = repeated(record)
    form: list[Form] = []

    def fill(place: Path) -> None:
        form.append(save(model, place, pad=pad, onnx=onnx))
        text = card(record, form[0], stock=_in_transformers(model))
        (place / "README.md").write_text(text, encoding="utf-8")

    write_folder(folder, fill)
    return form[0]


def repeated(record: Record) -> Model:
    """Return the model of a record, made again from its weights and methods."""
    from bench.applying import apply_methods
    from bench.device import seed_everything
    from bench.lending import lend
    from bench.models import loading
    from bench.progress import Progress

    config = recorded_config(record)
    source = loading.resolve(config.model, offline=config.offline)
    _refuse_change("weights", record.model.fingerprint, source.fingerprint)
    loan = lend(config)
    for what, found in loan.fingerprints.items():
        if found is not None:
            _refuse_change(what, record.provenance[what], found)
    # Same order as in a run: seed, load, apply. A method that draws from the global generator would
    # otherwise make a different model.
    seed_everything(config.seed)
    model = loading.load(source)
    apply_methods(config, model, loan.to(config, model, Progress()))
    return model


def recorded_config(record: Record) -> RunConfig:
    """Return the config of a run as recorded, with methods as objects.

    A record stores names and knobs of methods; the config tree maps a name to its class.
    """
    import shlex

    from bench.compose import run_config
    from bench.config import validate

    knobs = record.config["method"]
    # A third party's methods are found only with the search path that the run was given.
    searched = [w for w in shlex.split(record.command) if w.startswith("hydra.searchpath=")]
    known = run_config([f"method=[{','.join(knobs)}]", *searched]).method
    classes = {name: type(method) for name, method in known.items()}
    targets = {name: f"{kind.__module__}.{kind.__qualname__}" for name, kind in classes.items()}
    methods = {name: {"_target_": targets[name], **knobs[name]} for name in knobs}
    return validate({**record.config, "method": methods})


def _refuse_change(what: str, recorded: str | None, found: str) -> None:
    """Raise if an input differs from what the run read."""
    if recorded != found:
        raise UserError(f"the {what} changed since the run, so it cannot be repeated")


def _in_transformers(model: Model) -> bool:
    """Return whether the network's class is part of transformers."""
    return type(model.network).__module__.startswith("transformers.")
