"""Classifiers that code builds and no config file describes: slimbench's, torchvision's, a user's.

Their weights are drawn with a seed, or read from a state dict. Importing this module does not
import torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import UserError, unknown_name
from bench.schema import ModelConfig

if TYPE_CHECKING:
    from bench.data.image_sets import ImageShape
    from bench.models.classifiers.classifier import VisionConfig

FRESH_PREFIX = "fresh:"
TORCHVISION_PREFIX = "torchvision:"
MODULE_SOURCE = "module"
WEIGHTS_SUFFIX = ".safetensors"


def _has_built_network(config: ModelConfig) -> bool:
    """Whether the source names a network that code builds, and no files."""
    built = (FRESH_PREFIX, TORCHVISION_PREFIX)
    return config.source.startswith(built) or config.source == MODULE_SOURCE


def is_fresh(config: ModelConfig) -> bool:
    """Whether the model has no files; `model.path`, when given, overrides its source."""
    return config.path is None and _has_built_network(config)


def is_state_dict(config: ModelConfig) -> bool:
    """Whether `model.path` holds the weights of a network that code builds, and nothing else."""
    weights = config.path is not None and config.path.endswith(WEIGHTS_SUFFIX)
    return weights and _has_built_network(config)


def fresh_vision_config(config: ModelConfig) -> VisionConfig:
    """Return the architecture's config with the input shape of the named data set.

    Raises:
        UserError: the architecture or the data set does not exist, or no data set is given.
    """
    # Imported here because the architectures import torch, and `bench.models.source` stays
    # importable without it.
    from bench.models.classifiers import architectures
    from bench.models.classifiers.classifier import VisionConfig

    name = config.source.removeprefix(FRESH_PREFIX)
    if config.source.startswith(TORCHVISION_PREFIX):
        architecture = config.source.removeprefix(TORCHVISION_PREFIX)
        name = architectures.TORCHVISION_PREFIX + architecture
    elif config.target is not None:
        name = config.target
        architectures.register_module(name)
    elif name not in architectures.ARCHITECTURES:
        raise unknown_name("architecture", name, architectures.ARCHITECTURES)
    images = _input_and_output(config)
    return VisionConfig(
        architecture=name,
        channels=images.channels,
        size=images.size,
        classes=images.classes,
        arguments=config.arguments or {},
    )


def _input_and_output(config: ModelConfig) -> ImageShape:
    """Return the shape of the images: that of a known data set, changed by the config's own."""
    from bench.data.image_catalogue import IMAGENET_SHAPE, KNOWN_SETS, image_shape

    own = {key: getattr(config, key) for key in ("channels", "size", "classes")}
    given = {key: value for key, value in own.items() if value is not None}
    if config.images is not None:
        return replace(image_shape(config.images), **given)
    # What torchvision itself trains for.
    if config.source.startswith(TORCHVISION_PREFIX):
        return replace(IMAGENET_SHAPE, **given)
    if len(given) < len(own):
        raise UserError(
            f"model.images is missing: {config.source} needs one of {', '.join(KNOWN_SETS)}, or "
            "model.channels, model.size and model.classes"
        )
    return replace(IMAGENET_SHAPE, **given)


def fresh_fingerprint(config: ModelConfig) -> str:
    """Hash everything that fresh weights depend on, except the version of torch."""
    described = f"{fresh_vision_config(config).model_dump_json()} seed {config.seed}"
    return hashlib.sha256(described.encode()).hexdigest()


def fresh_folder() -> Path:
    """Return the folder of the code that draws the weights."""
    from bench.models import classifiers

    return Path(next(iter(classifiers.__path__)))
