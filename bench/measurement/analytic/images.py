"""Analytic cost of an image classifier.

A convolution uses each of its weights once per position of its output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.measurement.counting.ghost import ghost
from bench.models.products import Part, Product, weights
from bench.models.vision import Classifier


def images(network: Classifier, batch: int) -> list[Product]:
    """Return the multiply-adds of one forward over `batch` images of the network's input size.

    The forward runs on the meta device, so the layers themselves derive the output shapes from
    stride and padding and nothing is computed.
    """
    config = network.config
    products: list[Product] = []

    def note(layer: nn.Module, _: Any, output: Tensor) -> None:
        kind: Part = "convolution" if isinstance(layer, nn.Conv2d) else "dense"
        # A dense layer has no spatial dimensions; the product over none of them is 1.
        places = output.shape[0] * output.shape[2:].numel()
        products.append(Product(kind, float(places * weights(layer))))

    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        with ghost(network) as call:
            shape = (batch, config.channels, config.size, config.size)
            call(torch.zeros(shape, dtype=torch.bfloat16, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return products
