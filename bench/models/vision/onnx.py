"""Export of a classifier, dense or pruned, as an ONNX file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.errors import UserError
from bench.models.vision.classifier import Classifier

ONNX_FILE = "model.onnx"


def to_onnx(network: Classifier, folder: Path) -> Path:
    """Write the network as ONNX with a free batch size and return the file.

    Raises:
        UserError: the packages onnx and onnxscript, which torch's exporter needs, are missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = network.config
    weight = next(network.parameters())
    # Not a batch of one: the exporter specialises dimensions of size 1 to a constant.
    example = torch.zeros(2, config.channels, config.size, config.size).to(weight)
    try:
        with _quiet():
            program = torch.onnx.export(
                network.eval(),
                (example,),
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
    except ImportError as error:
        raise UserError(
            f"the ONNX export needs the packages onnx and onnxscript: {error}"
        ) from error
    assert program is not None
    program.save(folder / ONNX_FILE)
    return folder / ONNX_FILE


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's messages about opset versions."""
    # The exporter logs through several loggers; `logging.disable` covers them all.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
