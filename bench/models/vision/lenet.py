"""LeNet-5 (LeCun et al., 1998) in its common PyTorch form, with ReLU and max pooling."""

from __future__ import annotations

from torch import nn

from bench.models.vision.classifier import Classifier, VisionConfig


def lenet5(config: VisionConfig) -> Classifier:
    """Return LeNet-5: 6 and 16 filters of 5x5, dense layers of 120 and 84."""
    features = nn.Sequential(
        *_stage(config.channels, 6, kernel=5, padding=2),
        *_stage(6, 16, kernel=5, padding=0),
        nn.Flatten(),
    )
    # The first convolution is padded, the second (5x5) takes 4 pixels; each is halved by pooling.
    side = (config.size // 2 - 4) // 2
    return Classifier(config, features, _dense(16 * side**2, 120, 84, config.classes))


def micro_lenet(config: VisionConfig) -> Classifier:
    """Return a LeNet for images of 8x8: 16 and 32 filters of 3x3, dense layers of 64 and 32."""
    features = nn.Sequential(
        *_stage(config.channels, 16, kernel=3, padding=1),
        *_stage(16, 32, kernel=3, padding=1),
        nn.Flatten(),
    )
    return Classifier(
        config, features, _dense(32 * (config.size // 4) ** 2, 64, 32, config.classes)
    )


def _stage(inputs: int, outputs: int, kernel: int, padding: int) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=padding)
    return [layer, nn.ReLU(inplace=True), nn.MaxPool2d(2)]


def _dense(inputs: int, first: int, second: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, first),
        nn.ReLU(inplace=True),
        nn.Linear(first, second),
        nn.ReLU(inplace=True),
        nn.Linear(second, classes),
    )
