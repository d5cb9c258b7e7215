"""What all image classifiers share: a config that rebuilds them, and one way through.

Shapes: B images, C channels, H height and width, K classes.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from bench.data.images import Shape
from bench.errors import UserError

CONFIG_FILE = "config.json"


class VisionConfig(BaseModel):
    """All that is needed to build a classifier: its architecture, its input, what was cut.

    `shapes` has the weight shape of every layer that pruning made smaller, `removed` the residual
    branches that it took out; both are empty in a dense network.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    channels: int = Field(default=3, ge=1)
    size: int = Field(default=32, ge=8)
    classes: int = Field(default=10, ge=2)
    shapes: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    removed: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> VisionConfig:
        """Return the config that lies in a folder.

        Raises:
            UserError: it is not that of an image classifier.
        """
        file = folder / CONFIG_FILE
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"))
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(part) for part in fault["loc"]) or "the file"
            reason = f"{where}: {fault['msg'].lower()}"
            raise UserError(f"{file} does not describe an image classifier ({reason})") from None

    def refuse_other_images(self, name: str, images: Shape) -> None:
        """Raise unless the network is built for the images and classes of a data set."""
        wanted = (self.channels, self.size, self.classes)
        given = (images.channels, images.size, images.classes)
        if wanted != given:
            raise UserError(
                f"{self.architecture} is built for {wanted[0]} channels, size {wanted[1]} and "
                f"{wanted[2]} classes; {name} has {given[0]}, {given[1]} and {given[2]}"
            )

    def write(self, folder: Path) -> None:
        """Write the config into a folder."""
        text = json.dumps(self.model_dump(mode="json"), indent=2) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


class Classifier(nn.Module):
    """Feature layers, a mean over positions where the architecture has one, a linear head."""

    def __init__(self, config: VisionConfig, features: nn.Sequential, head: nn.Sequential) -> None:
        super().__init__()
        self.config = config
        self.features = features
        self.head = head

    def forward(self, image_BCHH: Tensor) -> Tensor:
        """Return the classes' logits, [B, K]."""
        logits_BK: Tensor = self.head(self.features(image_BCHH))
        return logits_BK


def pooled_head(width: int, classes: int) -> nn.Sequential:
    """Return the head that takes the mean over all positions."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def initialise(network: nn.Module) -> None:
    """Draw convolution weights as He et al. (2015) do for rectified layers; norms start at 1."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
