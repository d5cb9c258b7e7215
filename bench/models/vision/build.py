"""Construction of a classifier from its config: architectures by name, layers in saved shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bench.errors import UserError, unknown
from bench.models.vision.classifier import Classifier, VisionConfig, initialise
from bench.models.vision.densenet import densenet40, micro_densenet
from bench.models.vision.layers import Residual
from bench.models.vision.lenet import lenet5, micro_lenet
from bench.models.vision.mobilenet import micro_mobilenet, mobilenet_v1
from bench.models.vision.resnet import micro_resnet, resnet18, resnet50
from bench.models.vision.vgg import micro_vgg, vgg16

ARCHITECTURES: dict[str, Callable[[VisionConfig], Classifier]] = {
    # Function names are the names in configs and in saved folders: renaming a maker breaks both.
    maker.__name__: maker
    for maker in (
        lenet5,
        vgg16,
        resnet18,
        resnet50,
        mobilenet_v1,
        densenet40,
        micro_lenet,
        micro_vgg,
        micro_resnet,
        micro_mobilenet,
        micro_densenet,
    )
}


def build(config: VisionConfig) -> Classifier:
    """Return the network with fresh weights, pruned layers in their pruned shapes.

    Raises:
        UserError: the architecture does not exist, or the config resizes layers that it lacks.
    """
    if config.architecture not in ARCHITECTURES:
        raise unknown("architecture", config.architecture, ARCHITECTURES)
    network = ARCHITECTURES[config.architecture](config)
    for name in config.removed:
        remove_branch(network, name)
    for name, shape in config.shapes.items():
        resize(_layer(network, name), shape)
    # After resizing, which leaves weights uninitialised; the fan of He's initialisation is then
    # that of the pruned layer.
    initialise(network)
    return network


def remove_branch(network: nn.Module, name: str) -> None:
    """Remove a residual branch: its block then returns the shortcut alone."""
    block = network.get_submodule(name.rpartition(".")[0])
    if not isinstance(block, Residual):
        raise UserError(f"{name} is not a residual branch")
    block.branch = None


def resize(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Give a layer an uninitialised weight of a new shape, and adapt what depends on it."""
    if isinstance(layer, nn.Conv2d):
        # Only depthwise convolutions have groups here. Their weight is [channels, 1, k, k], so the
        # number of input channels is the second dimension times the groups.
        depthwise = layer.groups > 1
        layer.groups = shape[0] if depthwise else 1
        layer.out_channels, layer.in_channels = shape[0], shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shape
    elif isinstance(layer, nn.BatchNorm2d):
        layer.num_features = shape[0]
        # Statistics have the length of the layer; loading a state dict of a different length would
        # fail.
        layer.register_buffer("running_mean", torch.zeros(shape))
        layer.register_buffer("running_var", torch.ones(shape))
    else:
        raise UserError(f"a layer of type {type(layer).__name__} cannot be resized")
    with_bias = layer.bias is not None
    like = layer.weight
    layer.weight = nn.Parameter(like.new_ones(shape))
    if with_bias:
        layer.bias = nn.Parameter(like.new_zeros(shape[0]))


def _layer(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"the config resizes {name}, which {type(network).__name__} does not have"
        ) from None
