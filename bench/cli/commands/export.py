"""`bench export`: the model of a run, as a Hugging Face folder.

Records hold no weights. The run's methods are applied again, with the recorded settings, to the
same weights and the same calibration text; evaluation is skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import EXIT_DONE, UserError
from bench.records import Store
from bench.records.files import refuse_unwritable, write_folder
from bench.reporting.model_card import model_card
from bench.runner.replay import rebuild_model
from bench.runner.session import Session
from bench.ui import print_text

if TYPE_CHECKING:
    from bench.models.model import Model
    from bench.models.saving import ExportFormat


def export(
    run: str,
    folder: Path,
    results_dir: Path,
    session: Session,
    *,
    pad: bool = False,
    onnx: bool = False,
    allowed: Sequence[str] = (),
) -> ExportFormat:
    """Write the model of a run to a new folder, atomically, and return its format.

    `run` is a record's id or a prefix of it. `pad` fills experts of different widths up with zeros,
    so that stock transformers loads the folder. `onnx` also writes an image classifier as ONNX.
    `allowed` are the overrides by which the user lets code run that the record cannot allow; see
    `bench.runner.replay.recorded_config`.

    Raises:
        UserError: there is no such run, the folder is not empty, the run cannot be repeated because
            its weights, text or methods have changed, or its model cannot be written.
    """
    # Imported here: it loads torch, and a wrong run or folder is refused without.
    from bench.models.saving import save_model

    record = Store(results_dir).get(run)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: choose a different one")
    refuse_unwritable("DIR", folder, folder=True)
    kind = record.config.get("model", {}).get("kind", "causal_lm")
    if onnx and kind != "image_classifier":
        raise UserError(f"--onnx is for image classifiers; {record.model.name} is a {kind}")
    if pad and kind == "image_classifier":
        raise UserError(f"--padded is for experts; {record.model.name} is an image classifier")
    # The cheap refusals come first: repeating the methods may take hours.
    model = rebuild_model(record, session, allowed)
    written: list[ExportFormat] = []

    def fill(place: Path) -> None:
        written.append(save_model(model, place, pad=pad, onnx=onnx))
        text = model_card(record, written[0], stock=_is_stock_transformers(model))
        (place / "README.md").write_text(text, encoding="utf-8")

    write_folder(folder, fill)
    return written[0]


def _is_stock_transformers(model: Model) -> bool:
    """Return whether the network's class is part of transformers."""
    return type(model.network).__module__.startswith("transformers.")


def run_command(given: argparse.Namespace) -> int:
    """`bench export RUN DIR`."""
    with Session() as session:
        written = export(
            given.run,
            given.folder,
            given.results_dir,
            session,
            pad=given.padded,
            onnx=given.onnx,
            allowed=given.allowed,
        )
    print_text(f"wrote {given.folder} ({written}); its README.md says how to load it")
    return EXIT_DONE
