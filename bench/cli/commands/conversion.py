"""`bench convert` and `bench carve`: write a checkpoint in another layout, or as another model."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import cast

from bench.errors import EXIT_DONE
from bench.records.files import refuse_filled_folder, write_folder
from bench.ui import Progress, print_text


def convert(given: argparse.Namespace) -> int:
    """`bench convert FOLDER DIR --tower CLIP`."""
    # Imported here, because it loads transformers, which is not needed to refuse wrong folders.
    from bench.models.vlm.original_llava import convert_original_llava, read_original_config

    source, target = given.source, given.folder
    read_original_config(source)
    refuse_filled_folder(target)
    write_folder(target, partial(convert_original_llava, source, given.tower))
    print_text(f"wrote {target}: bench run model=local model.path={target} model.kind=image_text")
    return EXIT_DONE


def carve(given: argparse.Namespace) -> int:
    """`bench carve DIR model=NAME calibration=NAME --experts E --shared S --chosen K`."""
    # Imported here, because `bench convert` needs neither.
    from bench.config.composition import compose_run_config
    from bench.data.calibration import resolve_calibration

    target: Path = given.folder
    config = compose_run_config(given.overrides)
    refuse_filled_folder(target)
    # Imported here, because they load torch, which is not needed to refuse a wrong override.
    from bench.models.carving.carved_model import carve_model, refuse_uncarvable
    from bench.models.carving.neurons import ExpertLayout
    from bench.models.loading import load_model, skeleton
    from bench.models.network import TransformersNetwork
    from bench.models.source import resolve_model

    layout = ExpertLayout(given.experts, given.shared)
    source = resolve_model(config.model, offline=config.offline)
    network = cast(TransformersNetwork, skeleton(source))
    refuse_uncarvable(network.config, layout, given.chosen)
    text = resolve_calibration(config.calibration, offline=config.offline)
    model = load_model(source)
    tokens_BL = text.tokenize(model.tokenizer).tokens
    carved = carve_model(model, tokens_BL, layout, given.chosen, Progress())

    def fill(folder: Path) -> None:
        carved.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)

    write_folder(target, fill)
    print_text(
        f"wrote {target}: each layer has a shared expert and {layout.experts} routed ones, of "
        f"which a token uses {given.chosen}"
    )
    return EXIT_DONE
