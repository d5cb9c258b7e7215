"""MobileNetV1 (Howard et al., 2017): alternating depthwise and pointwise convolutions."""

from __future__ import annotations

from torch import nn

from bench.models.vision.classifier import Classifier, VisionConfig, pooled_head
from bench.models.vision.layers import convolution

Plan = tuple[tuple[int, int], ...]

LARGE_IMAGE = 64
MOBILENET: Plan = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip
MICRO: Plan = ((32, 1), (32, 1), (64, 2), (64, 1))


def mobilenet_v1(config: VisionConfig) -> Classifier:
    """Return MobileNetV1; images below 64 pixels keep their size in the first layer."""
    return _mobilenet(config, 32, MOBILENET)


def micro_mobilenet(config: VisionConfig) -> Classifier:
    """Return a MobileNet of four blocks for images of 8x8."""
    return _mobilenet(config, 16, MICRO)


def _mobilenet(config: VisionConfig, stem: int, plan: Plan) -> Classifier:
    """Return a MobileNet; `plan` has width and stride of every block."""
    stride = 2 if config.size >= LARGE_IMAGE else 1
    layers: list[nn.Module] = [convolution(config.channels, stem, stride=stride)]
    inputs = stem
    for width, step in plan:
        layers.append(convolution(inputs, inputs, stride=step, groups=inputs))
        layers.append(convolution(inputs, width, kernel=1))
        inputs = width
    return Classifier(config, nn.Sequential(*layers), pooled_head(inputs, config.classes))
