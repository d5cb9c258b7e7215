"""A classifier as a folder: config.json and model.safetensors."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bench.errors import MissingData, UserError
from bench.models.vision.build import build
from bench.models.vision.classifier import CONFIG_FILE, Classifier, VisionConfig

WEIGHTS_FILE = "model.safetensors"


def save(network: Classifier, folder: Path) -> None:
    """Write the network, dense or pruned, so that `load_classifier_folder` restores it."""
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors rejects non-contiguous tensors, such as slices of weights.
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    network.config.write(folder)


def load(folder: Path) -> Classifier:
    """Return the network in evaluation mode.

    Raises:
        MissingData: a file of the folder is missing.
        UserError: the files do not belong together.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise MissingData(f"{folder} is not a saved classifier: it has no {name}")
    try:
        network = build(VisionConfig.read(folder))
        network.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} cannot be loaded as a classifier: {reason}") from error
    network.eval()
    return network
