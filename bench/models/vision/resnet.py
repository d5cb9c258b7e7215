"""ResNet (He et al., 2016): basic blocks for CIFAR, bottlenecks for ImageNet."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from bench.models.vision.classifier import Classifier, VisionConfig, pooled_head
from bench.models.vision.layers import Residual, convolution, unactivated

Block = Callable[[int, int, int], Residual]

BOTTLENECK_EXPANSION = 4
LARGE_IMAGE = 64
"""From this size on, the stem reduces the image by four, as for ImageNet."""


def resnet18(config: VisionConfig) -> Classifier:
    """Return ResNet-18: two basic blocks in each of four stages."""
    return _resnet(config, basic_block, ((64, 2), (128, 2), (256, 2), (512, 2)))


def resnet50(config: VisionConfig) -> Classifier:
    """Return ResNet-50: stages of 3, 4, 6 and 3 bottlenecks."""
    return _resnet(config, bottleneck, ((256, 3), (512, 4), (1024, 6), (2048, 3)), stem=64)


def micro_resnet(config: VisionConfig) -> Classifier:
    """Return a ResNet of three basic blocks for images of 8x8."""
    return _resnet(config, basic_block, ((16, 1), (32, 1), (64, 1)))


def basic_block(inputs: int, outputs: int, stride: int) -> Residual:
    """Return two 3x3 convolutions with a shortcut."""
    branch = nn.Sequential(
        convolution(inputs, outputs, stride=stride), unactivated(outputs, outputs)
    )
    return Residual(branch, _shortcut(inputs, outputs, stride))


def bottleneck(inputs: int, outputs: int, stride: int) -> Residual:
    """Return 1x1, 3x3 and 1x1 convolutions, the middle one four times narrower."""
    inner = outputs // BOTTLENECK_EXPANSION
    branch = nn.Sequential(
        convolution(inputs, inner, kernel=1),
        # The stride is in the 3x3 convolution, as in torchvision's version (v1.5), not in the first
        # 1x1 of the paper.
        convolution(inner, inner, stride=stride),
        unactivated(inner, outputs, kernel=1),
    )
    return Residual(branch, _shortcut(inputs, outputs, stride))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return unactivated(inputs, outputs, kernel=1, stride=stride)


def _resnet(
    config: VisionConfig, block: Block, stages: tuple[tuple[int, int], ...], stem: int = 0
) -> Classifier:
    """Return a ResNet; `stages` has width and number of blocks, `stem` its width if different."""
    inputs = stem or stages[0][0]
    if config.size >= LARGE_IMAGE:
        first = convolution(config.channels, inputs, kernel=7, stride=2)
        layers: list[nn.Module] = [first, nn.MaxPool2d(3, stride=2, padding=1)]
    else:
        layers = [convolution(config.channels, inputs)]
    for number, (width, blocks) in enumerate(stages):
        for index in range(blocks):
            # The first block of every stage but the first halves the image.
            layers.append(block(inputs, width, 2 if index == 0 and number > 0 else 1))
            inputs = width
    return Classifier(config, nn.Sequential(*layers), pooled_head(inputs, config.classes))
