"""Common parts of all image classifiers: a config that rebuilds them, and one forward.

Shapes: B images, C channels, H height and width, K classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from bench.data.image_sets import ImageShape
from bench.errors import UserError
from bench.models.classifiers.pruned_modules import Shortcut

CONFIG_FILE = "config.json"


class VisionConfig(BaseModel):
    """Everything needed to build a classifier: architecture, input, and pruned parts.

    `shapes` has the weight shape of every layer that pruning made smaller; `removed` are the
    residual blocks that were reduced to their shortcut. Both are empty for a dense model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    channels: int = Field(default=3, ge=1)
    size: int = Field(default=32, ge=8)
    classes: int = Field(default=10, ge=2)
    # The config alone determines every shape, so that a pruned network can be built without its
    # weights, for instance on meta.
    shapes: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    removed: tuple[Shortcut, ...] = ()
    # Arguments for the class of a user's own network.
    arguments: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> VisionConfig:
        """Read the config of a folder.

        Raises:
            UserError: it does not describe an image classifier.
        """
        file = folder / CONFIG_FILE
        try:
            return cls.model_validate_json(file.read_bytes())
        except ValidationError as error:
            # The first fault suffices; a folder of another kind of model has dozens.
            fault = error.errors()[0]
            where = ".".join(str(part) for part in fault["loc"]) or "the file"
            reason = f"{where}: {fault['msg'].lower()}"
            raise UserError(f"{file} does not describe an image classifier ({reason})") from None

    def refuse_mismatched_images(self, name: str, images: ImageShape) -> None:
        """Raise unless the network fits the images and classes of a data set."""
        wanted = (self.channels, self.size, self.classes)
        given = (images.channels, images.size, images.classes)
        if wanted != given:
            raise UserError(
                f"{self.architecture} is built for {wanted[0]} channels, size {wanted[1]} and "
                f"{wanted[2]} classes; {name} has {given[0]}, {given[1]} and {given[2]}: choose "
                "images that it fits, or a network for these, by model.images or by model.size and "
                "model.classes"
            )

    def write(self, folder: Path) -> None:
        """Write the config into a folder."""
        text = json.dumps(self.model_dump(mode="json"), indent=2) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


class Classifier(nn.Module):
    """Feature layers, global average pooling if the architecture has it, and a linear head."""

    def __init__(self, config: VisionConfig, features: nn.Sequential, head: nn.Sequential) -> None:
        super().__init__()
        self.config = config
        self.features = features
        self.head = head

    def forward(self, image_BCHH: Tensor) -> Tensor:
        """Compute the logits of the classes, [B, K]."""
        logits_BK: Tensor = self.head(self.features(image_BCHH))
        return logits_BK


def pooled_head(width: int, classes: int) -> nn.Sequential:
    """Return a head with global average pooling and one linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def initialise(network: nn.Module) -> None:
    """Draw convolution weights for ReLU layers (He et al., 2015); norms keep weights of 1."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
