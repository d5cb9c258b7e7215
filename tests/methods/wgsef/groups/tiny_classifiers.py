"""Small networks of torchvision's classes, without constant weights that would hide a fault."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import VisionTransformer

from bench.models.classifiers import architectures
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import Classifier, VisionConfig
from methods.wgsef.groups.verification import with_random_weights

NAME = "torchvision.VisionTransformer"
MIXED = {
    "groups": ["heads", "filters", "depth"],
    "layers": {"heads": "*layer_0*", "filters": "*layer_0.mlp*", "depth": "*layer_[12]"},
}
"""Three kinds of groups of the vision transformer, which do not overlap."""


def vit(monkeypatch) -> Classifier:
    """Return a vision transformer of three layers and four heads, as a user's own network."""
    monkeypatch.setitem(architectures._MODULES, NAME, VisionTransformer)
    arguments = {
        "image_size": 8, "patch_size": 4, "num_layers": 3, "num_heads": 4, "hidden_dim": 16,
        "mlp_dim": 24, "num_classes": 5,
    }  # fmt: skip
    torch.manual_seed(0)
    config = VisionConfig(architecture=NAME, size=8, classes=5, arguments=arguments)
    return drawn(build_classifier(config))


def resnet18() -> Classifier:
    """Return torchvision's ResNet-18 for images of 32x32."""
    torch.manual_seed(0)
    config = VisionConfig(architecture="torchvision/resnet18", size=32, classes=5)
    return drawn(build_classifier(config))


def drawn(network: nn.Module) -> nn.Module:
    """Return a network whose norms and head are drawn as well."""
    random, _ = with_random_weights(network, torch.zeros(1))
    return random.float()
