"""DenseNet (Huang et al., 2017) without bottlenecks, as in the 40-layer network for CIFAR."""

from __future__ import annotations

from torch import nn

from bench.models.vision.classifier import Classifier, VisionConfig, pooled_head
from bench.models.vision.layers import Dense


def densenet40(config: VisionConfig) -> Classifier:
    """Return DenseNet-40: three blocks of twelve layers, growth rate 12."""
    return _densenet(config, growth=12, blocks=(12, 12, 12))


def micro_densenet(config: VisionConfig) -> Classifier:
    """Return a DenseNet of two blocks of three layers for images of 8x8."""
    return _densenet(config, growth=8, blocks=(3, 3))


def _densenet(config: VisionConfig, growth: int, blocks: tuple[int, ...]) -> Classifier:
    """Return a DenseNet whose transitions keep the number of channels and halve the image."""
    width = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(config.channels, width, 3, padding=1, bias=False)]
    for number, count in enumerate(blocks):
        if number > 0:
            layers += _transition(width)
        for _ in range(count):
            layers.append(Dense(width, growth))
            width += growth
    layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return Classifier(config, nn.Sequential(*layers), pooled_head(width, config.classes))


def _transition(width: int) -> list[nn.Module]:
    return [
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 1, bias=False),
        nn.AvgPool2d(2),
    ]
