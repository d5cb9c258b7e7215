"""From a config to a network: the architectures by name, and layers cut to their saved shapes."""

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
        UserError: there is no such architecture, or the config cuts layers that it has not.
    """
    if config.architecture not in ARCHITECTURES:
        raise unknown("architecture", config.architecture, ARCHITECTURES)
    network = ARCHITECTURES[config.architecture](config)
    for name in config.removed:
        remove_branch(network, name)
    for name, shape in config.shapes.items():
        resize(_layer(network, name), shape)
    initialise(network)
    return network


def remove_branch(network: nn.Module, name: str) -> None:
    """Take a residual branch out: its block hands on the shortcut alone."""
    block = network.get_submodule(name.rpartition(".")[0])
    if not isinstance(block, Residual):
        raise UserError(f"{name} is not a residual branch")
    block.branch = None


def resize(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Give a layer an uninitialised weight of another shape and all that depends on it."""
    if isinstance(layer, nn.Conv2d):
        depthwise = layer.groups > 1
        layer.groups = shape[0] if depthwise else 1
        layer.out_channels, layer.in_channels = shape[0], shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shape
    elif isinstance(layer, nn.BatchNorm2d):
        layer.num_features = shape[0]
        layer.register_buffer("running_mean", torch.zeros(shape))
        layer.register_buffer("running_var", torch.ones(shape))
    else:
        raise UserError(f"a layer of type {type(layer).__name__} cannot be cut")
    with_bias = layer.bias is not None
    like = layer.weight
    layer.weight = nn.Parameter(like.new_ones(shape))
    if with_bias:
        layer.bias = nn.Parameter(like.new_zeros(shape[0]))


def _layer(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        raise UserError(f"the config cuts {name}, which {type(network).__name__} has not") from None
