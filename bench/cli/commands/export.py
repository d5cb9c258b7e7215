"""`bench export`: write the model of a run as a Hugging Face folder.

A trained image classifier is stored with its record (keep_weights). For other runs the methods are
applied again, with the recorded settings, to the same weights and the same calibration text,
without evaluation.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import EXIT_DONE, UserError
from bench.records import Record, Store
from bench.records.files import refuse_filled_folder, write_folder
from bench.reporting.model_card import Contents, model_card
from bench.runner.replay import rebuild_model, refuse_other_network
from bench.runner.session import Session
from bench.ui import print_text

if TYPE_CHECKING:
    from bench.models.model import Model
    from bench.models.saving import ExportFormat
    from bench.models.serving.engines import Engine


def export(
    run: str,
    folder: Path,
    results_dir: Path,
    session: Session,
    *,
    engine: str | None = None,
    align: int | None = None,
    onnx: bool = False,
    allowed: Sequence[str] = (),
) -> ExportFormat:
    """Write the model of a run to a new folder, atomically, and return its format.

    `run` is a record's id or a prefix of it. For an `engine` (`bench.models.serving.engines`), all
    experts get the same width, a multiple of `align`, and packed weights are written as
    compressed-tensors; weights that this removes are reported first. `onnx` also writes an image
    classifier as ONNX. `allowed` are the overrides with which the user allows code of the run; see
    `bench.runner.replay.recorded_config`.

    Raises:
        UserError: there is no such run, the folder is not empty, the run cannot be repeated because
            its weights, text or methods have changed, or its model cannot be written.
    """
    # Imported here, because it loads torch, which is not needed to refuse a wrong run or folder.
    from bench.models.saving import plan_export, write_model
    from bench.models.serving.engines import loading_engines

    wanted = _wanted_engine(engine, align)
    store = Store(results_dir)
    record = store.get(run)
    refuse_filled_folder(folder)
    _refuse_unfit(record, wanted, onnx=onnx)
    # After all cheap checks, because repeating the methods may take hours.
    model = rebuild_model(record, store, session, allowed)
    refuse_other_network(record, model, allowed)
    plan = plan_export(model, wanted, onnx=onnx)
    if plan.removal is not None:
        print_text(str(plan.removal))

    def fill(place: Path) -> None:
        write_model(model, place, plan)
        weights = sum(file.stat().st_size for file in place.glob("*.safetensors"))
        contents = Contents(plan.form, weights, str(plan.removal) if plan.removal else None)
        loading = [e.loading for e in loading_engines(wanted)]
        text = model_card(record, contents, loading, stock=_is_stock_transformers(model))
        (place / "README.md").write_text(text, encoding="utf-8")

    write_folder(folder, fill)
    return plan.form


def _wanted_engine(name: str | None, align: int | None) -> Engine | None:
    """Return the engine to export for, None for no particular one."""
    from bench.models.serving.engines import find_engine

    if name is not None:
        return find_engine(name, align)
    if align is not None:
        raise UserError(
            "--align sets the widths for an inference engine: add --for vllm or --for sglang"
        )
    return None


def _refuse_unfit(record: Record, engine: Engine | None, *, onnx: bool) -> None:
    """Raise if the run's model cannot be written for the engine, or as ONNX."""
    kind = record.config.get("model", {}).get("kind", "causal_lm")
    if onnx and kind != "image_classifier":
        raise UserError(f"--onnx is for image classifiers; {record.model.name} is a {kind}")
    if engine is None:
        return
    if kind != "causal_lm":
        raise UserError(
            f"--for {engine.name} is for language models; {record.model.name} is a {kind}"
        )
    for name, knobs in record.config.get("method", {}).items():
        if knobs.get("grid") == "offset":
            raise UserError(
                f"run {record.id} quantized with method.{name}.grid=offset, which {engine.name} "
                f"does not support: run it with method.{name}.grid=symmetric"
            )


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
            engine=given.engine,
            align=given.align,
            onnx=given.onnx,
            allowed=given.allowed,
        )
    print_text(f"wrote {given.folder} ({written}); its README.md says how to load it")
    return EXIT_DONE
