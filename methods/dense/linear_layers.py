"""Linear layers of a decoder layer, and the norms of their inputs.

Shapes: T tokens, C input columns, R output rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.errors import UserError
from bench.models.bitpacking.packed_modules import packed_linears
from bench.models.structure.dense_layer import is_projection, weight_of
from bench.models.structure.model_structure import ModelStructure


@dataclass(frozen=True)
class LinearLayer:
    """One projection of a decoder layer; `name` is relative to the layer."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """The weight [R, C]: a view, so that changes reach the module."""
        return weight_of(self.module)


def linear_layers(layer: nn.Module) -> list[LinearLayer]:
    """Return all projections of a decoder layer: attention and feed-forward."""
    return [
        LinearLayer(name, module) for name, module in layer.named_modules() if is_projection(module)
    ]


def require_dense_decoder(structure: ModelStructure, method: str) -> None:
    """Refuse networks whose weights are not all in linear layers.

    Raises:
        UserError: there are no decoder layers, or some hold routed experts or packed weights.
    """
    if not structure.layers:
        raise UserError(f"{method} needs a decoder; {structure.architecture} has no decoder layers")
    if structure.moe:
        raise UserError(
            f"{method} prunes linear layers, but most weights of {structure.architecture} are in "
            "routed experts: choose a dense decoder, or a method for experts such as camera_p"
        )
    for index, layer in enumerate(structure.layers):
        refuse_packed(layer, index)
        if not linear_layers(layer):
            raise UserError(f"{method} finds no linear layer in layer {index}")


def refuse_packed(layer: nn.Module, index: int) -> None:
    """Raise if weights of a layer are packed, and so cannot be modified."""
    if any(True for _ in packed_linears(layer)):
        raise UserError(
            f"the weights of layer {index} are quantized already: list pruning methods before "
            "the quantization method"
        )


class InputSquares:
    """Σ x² of every input of a projection, [C] in float32."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.total = torch.zeros(columns, dtype=torch.float32, device=device)

    def add(self, x_TC: Tensor) -> None:
        """Add some tokens."""
        self.total += x_TC.float().square().sum(0)
