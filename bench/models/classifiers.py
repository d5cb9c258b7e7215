"""Image classifiers with saved or fresh weights, checked against the size of the images."""

from __future__ import annotations

import torch

from bench import device as devices
from bench.errors import UserError
from bench.models import vision
from bench.models.fresh import is_fresh, vision_config
from bench.models.source import Source
from bench.models.vision import Classifier, VisionConfig


def empty(source: Source) -> Classifier:
    """Build the network on the meta device.

    Raises:
        UserError: the folder does not describe a classifier, or its images are too small for it.
    """
    config = _config(source)
    with torch.device("meta"), torch.no_grad():
        try:
            network = vision.build(config).eval()
            # Constructors accept any size; only a forward shows that the pooling layers leave no
            # pixel. On meta it costs no arithmetic and the message names no internal shape.
            network(torch.zeros(1, config.channels, config.size, config.size))
        except RuntimeError:
            raise UserError(
                f"{config.architecture} does not fit images of size {config.size} with "
                f"{config.channels} channels: a layer would have an empty output"
            ) from None
    return network


def load(source: Source, device: torch.device) -> Classifier:
    """Return the network with its weights on the device, not yet in evaluation mode.

    Raises:
        UserError: the weights do not match the network, or `model.device_map` is set.
    """
    if source.config.device_map is not None:
        raise UserError("model.device_map is for language models: set it to null for a classifier")
    # Fresh weights are drawn on the CPU and moved, so that a seed gives the same weights on every
    # device.
    network = _fresh(source) if is_fresh(source.config) else vision.load(source.folder)
    return network.to(device, devices.dtype(source.config.dtype, device))


def _config(source: Source) -> VisionConfig:
    if is_fresh(source.config):
        return vision_config(source.config)
    return VisionConfig.read(source.folder)


def _fresh(source: Source) -> Classifier:
    """Draw the weights without advancing the global generator."""
    # Without the fork, fresh weights would shift every later draw (shuffling, calibration), and a
    # run with fresh weights would differ from a run that loads the same weights from a folder.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.config.seed or 0)
        return vision.build(vision_config(source.config))
