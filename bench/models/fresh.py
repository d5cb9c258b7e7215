"""Image classifiers without files: fresh weights of an architecture, drawn with a seed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import UserError
from bench.models.config import ModelConfig

if TYPE_CHECKING:
    from bench.models.vision import VisionConfig

FRESH = "fresh:"


def is_fresh(config: ModelConfig) -> bool:
    """Whether the model has no files; `model.path`, when given, overrides its source."""
    return config.path is None and config.source.startswith(FRESH)


def vision_config(config: ModelConfig) -> VisionConfig:
    """Return the architecture's config with the input shape of the named data set.

    Raises:
        UserError: the architecture or the data set does not exist, or no data set is given.
    """
    # Imported here because the architectures import torch, and `bench.models.source` stays
    # importable without it.
    from bench.data.images import SETS, shape
    from bench.errors import unknown
    from bench.models.vision import ARCHITECTURES, VisionConfig

    name = config.source.removeprefix(FRESH)
    if name not in ARCHITECTURES:
        raise unknown("architecture", name, ARCHITECTURES)
    if config.images is None:
        raise UserError(f"model.images is missing: {config.source} needs one of {', '.join(SETS)}")
    images = shape(config.images)
    return VisionConfig(
        architecture=name, channels=images.channels, size=images.size, classes=images.classes
    )


def fresh_fingerprint(config: ModelConfig) -> str:
    """Hash everything that fresh weights depend on, except the version of torch."""
    said = f"{vision_config(config).model_dump_json()} seed {config.seed}"
    return hashlib.sha256(said.encode()).hexdigest()


def fresh_folder() -> Path:
    """Return the folder of the code that draws the weights."""
    from bench.models import vision

    return Path(next(iter(vision.__path__)))
