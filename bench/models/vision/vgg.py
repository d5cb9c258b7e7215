"""VGG (Simonyan and Zisserman, 2015) with BatchNorm and one dense layer, as used for CIFAR."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from bench.models.vision.classifier import Classifier, VisionConfig, pooled_head
from bench.models.vision.layers import convolution

Stages = tuple[tuple[int, ...], ...]

VGG16: Stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
MICRO: Stages = ((16, 16), (32, 32), (32, 32))


def vgg16(config: VisionConfig) -> Classifier:
    """Return VGG-16: thirteen convolutions in five stages."""
    return _vgg(config, VGG16)


def micro_vgg(config: VisionConfig) -> Classifier:
    """Return a VGG of six convolutions for images of 8x8."""
    return _vgg(config, MICRO)


def _vgg(config: VisionConfig, stages: Stages) -> Classifier:
    layers: list[nn.Module] = []
    inputs = config.channels
    for number, stage in enumerate(stages):
        if number > 0:
            layers.append(nn.MaxPool2d(2))
        layers += [convolution(before, width) for before, width in pairwise((inputs, *stage))]
        inputs = stage[-1]
    return Classifier(config, nn.Sequential(*layers), pooled_head(inputs, config.classes))
