"""Saving and loading of classifiers as folders, and export to ONNX."""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bench.errors import MissingData, UserError
from bench.models.classifiers.architectures import (
    AUXILIARY_HEADS,
    TORCHVISION_PREFIX,
    build_classifier,
)
from bench.models.classifiers.classifier import CONFIG_FILE, Classifier, VisionConfig

WEIGHTS_FILE = "model.safetensors"


def save_classifier(network: Classifier, folder: Path) -> None:
    """Write the network, dense or pruned, so that `load_classifier_folder` restores it."""
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors rejects non-contiguous tensors, such as slices of weights.
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    network.config.write(folder)


def load_classifier_folder(folder: Path) -> Classifier:
    """Return the network in evaluation mode.

    Raises:
        MissingData: a file of the folder is missing.
        UserError: the files do not match each other.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise MissingData(f"{folder} is not a saved classifier: it has no {name}")
    try:
        network = build_classifier(VisionConfig.read(folder))
        state = OrderedDict(load_file(folder / WEIGHTS_FILE))
        # safetensors does not store versions of modules, which some modules require (MNASNet).
        # Files written by this program have the current ones.
        state._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
        network.load_state_dict(state)
    except (ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} cannot be loaded as a classifier: {reason}") from error
    network.eval()
    return network


def load_state(network: Classifier, file: Path) -> Classifier:
    """Return a network in evaluation mode, with the weights of a state dict in safetensors.

    Raises:
        UserError: the state dict does not match the network.
    """
    # The wrapper of a foreign network adds a prefix, which is not in the user's file.
    target = network if len(network.head) else network.features[0]
    name = network.config.architecture.removeprefix(TORCHVISION_PREFIX)
    # Of heads that the network is built without, unless the user asks for them.
    unused = () if network.config.arguments.get("aux_logits") else AUXILIARY_HEADS.get(name, ())
    try:
        # No versions of modules are added, so that torch reads the file like one of an older
        # version.
        state = load_file(file)
        target.load_state_dict({k: v for k, v in state.items() if not k.startswith(unused)})
    except (ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"model.path={file} does not fit {network.config.architecture}: {reason}"
        ) from error
    network.eval()
    return network


INPUT_ARGUMENT = "transform_input"
"""Argument of these networks that rescales images as torchvision's own weights need them."""


def refuse_unknown_input(config: VisionConfig) -> None:
    """Raise if a network with given weights may need images in another scale than it would get.

    The weights do not say which scale they were trained with.
    """
    name = config.architecture.removeprefix(TORCHVISION_PREFIX)
    if name in AUXILIARY_HEADS and INPUT_ARGUMENT not in config.arguments:
        raise UserError(
            f"{config.architecture} with model.path needs model.arguments: give "
            f"'{{{INPUT_ARGUMENT}: true}}' for the weights that torchvision publishes, which were "
            f"trained on images from -1 to 1, or '{{{INPUT_ARGUMENT}: false}}' for weights "
            "trained on images normalised as for ImageNet"
        )


ONNX_FILE = "model.onnx"


def save_onnx(network: Classifier, folder: Path) -> Path:
    """Write the network as ONNX with a free batch size and return the file.

    Raises:
        UserError: the packages onnx and onnxscript, which torch's exporter needs, are missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = network.config
    weight = next(network.parameters())
    # Not a batch of one, because the exporter treats dimensions of size 1 as constants.
    example = torch.zeros(2, config.channels, config.size, config.size).to(weight)
    try:
        with _quiet_exporter():
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
def _quiet_exporter() -> Iterator[None]:
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
