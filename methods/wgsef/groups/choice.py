"""The kinds of groups by name, and how many of each a classifier has, known before it is loaded."""

from __future__ import annotations

import functools
from typing import Literal

import torch

from bench.models.vision import Classifier, VisionConfig, build
from methods.wgsef.groups import convolution
from methods.wgsef.groups.family import Family

ConvolutionGroups = Literal["filters", "channels", "filter_shapes", "weights", "depth"]


def chosen(network: Classifier, kind: ConvolutionGroups) -> list[Family]:
    """Return the groups of one kind.

    Raises:
        UserError: the network has none, or cannot be traced.
    """
    config = network.config
    weight = next(network.parameters())
    example = weight.new_zeros(1, config.channels, config.size, config.size)
    kinds = {
        "filters": convolution.filters,
        "channels": convolution.channels,
        "filter_shapes": convolution.filter_shapes,
        "weights": convolution.weights,
        "depth": convolution.depth,
    }
    return kinds[kind](network, example)


def sizes(config: VisionConfig, kind: ConvolutionGroups) -> list[int]:
    """Return how many groups each family of such a network has.

    Raises:
        UserError: as `chosen` does.
    """
    return _sizes(config.model_dump_json(), kind)


@functools.lru_cache(maxsize=32)
def _sizes(config: str, kind: ConvolutionGroups) -> list[int]:
    """Build the network once; all methods of a sweep ask."""
    with torch.random.fork_rng(devices=[]):
        network = build(VisionConfig.model_validate_json(config))
    return [family.groups for family in chosen(network, kind)]
