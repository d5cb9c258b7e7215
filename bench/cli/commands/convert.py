"""`bench convert`: convert a LLaVA checkpoint from its original layout to that of transformers."""

from __future__ import annotations

import argparse
from functools import partial

from bench.errors import EXIT_DONE
from bench.records.files import refuse_filled_folder, write_folder
from bench.ui import print_text


def run_command(given: argparse.Namespace) -> int:
    """`bench convert FOLDER DIR --tower CLIP`."""
    # Imported here, because it loads transformers, which is not needed to refuse wrong folders.
    from bench.models.vlm.original_llava import convert_original_llava, read_original_config

    source, target = given.source, given.folder
    read_original_config(source)
    refuse_filled_folder(target)
    write_folder(target, partial(convert_original_llava, source, given.tower))
    print_text(f"wrote {target}: bench run model=local model.path={target} model.kind=image_text")
    return EXIT_DONE
