"""Kinds of groups by name, and their number in a classifier whose weights are not yet loaded."""

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
    """Return the number of groups of each family of a network with this config.

    Raises:
        UserError: the network has no such groups, or cannot be traced.
    """
    # Pydantic configs are not hashable, JSON text is: it is the cache key.
    return _sizes(config.model_dump_json(), kind)


# Building and tracing a network is slow, and every job of a sweep checks its budget against the
# same few configs.
@functools.lru_cache(maxsize=32)
def _sizes(config: str, kind: ConvolutionGroups) -> list[int]:
    # Initialising weights draws random numbers; a check must not shift the random state of the run.
    with torch.random.fork_rng(devices=[]):
        network = build(VisionConfig.model_validate_json(config))
    return [family.groups for family in chosen(network, kind)]
