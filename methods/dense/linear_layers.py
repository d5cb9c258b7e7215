"""Linear layers of a decoder layer, and statistics of their inputs.

Shapes: T tokens, C input columns, R output rows.

GPT-2 stores its projections as `Conv1D` with the weight transposed; a view makes both alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bench.errors import UserError
from bench.models.bitpacking.packed_modules import packed_linears
from bench.models.structure.model_structure import ModelStructure

Projection = TypeVar("Projection", bound=nn.Module)


@dataclass(frozen=True)
class LinearLayer:
    """One projection of a decoder layer; `name` is relative to the layer."""

    name: str
    module: nn.Linear | Conv1D

    @property
    def weight(self) -> Tensor:
        """The weight [R, C]: a view, so that changes reach the module."""
        weight = self.module.weight.data
        return weight.T if isinstance(self.module, Conv1D) else weight


def linear_layers(layer: nn.Module) -> list[LinearLayer]:
    """Return all projections of a decoder layer: attention and feed-forward."""
    return [
        LinearLayer(name, module)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
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


class InputStatistics(Protocol):
    """A statistic accumulated over the inputs of a projection."""

    def add(self, x_TC: Tensor) -> None:
        """Add some tokens."""


class InputSquares:
    """Σ x² of every input of a projection, [C] in float32."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.total = torch.zeros(columns, dtype=torch.float32, device=device)

    def add(self, x_TC: Tensor) -> None:
        """Add some tokens."""
        self.total += x_TC.float().square().sum(0)


class InputProducts:
    """Σ x xᵀ of the inputs of a projection, [C, C] in float32."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.total = torch.zeros(columns, columns, dtype=torch.float32, device=device)

    def add(self, x_TC: Tensor) -> None:
        """Add some tokens."""
        x_TC = x_TC.float()
        self.total.addmm_(x_TC.T, x_TC)


@contextmanager
def observed_inputs(
    statistics: Mapping[Projection, InputStatistics],
) -> Iterator[None]:
    """Add the inputs of every call of the modules to their statistics."""

    def observe(module: Projection, args: tuple[Tensor, ...]) -> None:
        statistics[module].add(args[0].flatten(0, -2))

    with ExitStack() as stack:
        for module in statistics:
            stack.callback(module.register_forward_pre_hook(observe).remove)
        yield
