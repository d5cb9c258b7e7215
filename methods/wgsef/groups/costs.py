"""What the groups of a network cost: multiply-adds or bytes, exactly and per group.

Shapes: F families, Y layers, M groups of all families, P selections compared at once.

A layer that keeps a share of its inputs and of its outputs costs the product of both shares, so
the cost of a network depends on how many groups each family keeps (a count, not measured).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench.errors import UserError
from methods.wgsef.groups.dependency import PRODUCERS
from methods.wgsef.groups.family import Family

Quantity = Literal["macs", "bytes"]

COUPLED = ("filters", "channels")


class Costs:
    """The cost of the convolutions and dense layers of a network as a function of what is kept.

    Raises:
        UserError: the families are not of a kind whose removal makes layers smaller.
    """

    def __init__(
        self, network: nn.Module, families: Sequence[Family], example: Tensor, quantity: Quantity
    ) -> None:
        kinds = {family.kind for family in families} - set(COUPLED)
        if kinds:
            raise UserError(
                f"a budget in {quantity} needs groups whose removal makes layers smaller "
                f"({' or '.join(COUPLED)}), not {', '.join(sorted(kinds))}"
            )
        layers: dict[str, nn.Module] = {
            n: m for n, m in network.named_modules() if isinstance(m, PRODUCERS)
        }
        amounts = _amounts(network, layers, example, quantity)
        self.size_F = torch.tensor([float(family.groups) for family in families])
        self._amount_Y = torch.tensor(amounts, dtype=torch.float64)
        # Which part of each layer's outputs and inputs one group of each family accounts for.
        self._out_YF = torch.zeros(len(layers), len(families), dtype=torch.float64)
        self._in_YF = torch.zeros_like(self._out_YF)
        for column, family in enumerate(families):
            for row, (name, layer) in enumerate(layers.items()):
                shape = layer.get_parameter("weight").shape
                for part in (*family.owned, *family.readers):
                    if part.tensor == f"{name}.weight":
                        share_YF = self._in_YF if part.axes == (1,) else self._out_YF
                        units = len(part.units) / family.groups
                        share_YF[row, column] += units / shape[part.axes[0]]

    def total(self, kept_PF: Tensor) -> Tensor:
        """Return the cost [P] of networks that keep so many groups of each family."""
        gone_PF = (self.size_F - kept_PF).double()
        outputs_PY = 1 - gone_PF @ self._out_YF.T
        inputs_PY = 1 - gone_PF @ self._in_YF.T
        return (outputs_PY * inputs_PY) @ self._amount_Y

    def dense(self) -> float:
        """Return the cost of the whole network."""
        return float(self._amount_Y.sum())

    def per_group(self) -> Tensor:
        """Return what removing one group of each family saves in the dense network, [F]."""
        without_one_FF = self.size_F - torch.eye(len(self.size_F))
        return self.dense() - self.total(without_one_FF)


def _amounts(
    network: nn.Module, layers: dict[str, nn.Module], example: Tensor, quantity: Quantity
) -> list[float]:
    """Return the multiply-adds for one example, or the bytes of the weights, of every layer."""
    sizes = [layer.get_parameter("weight") for layer in layers.values()]
    if quantity == "bytes":
        return [float(weight.numel() * weight.element_size()) for weight in sizes]
    places: dict[nn.Module, int] = {}

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        places[module] = output.shape[2:].numel()

    handles = [layer.register_forward_hook(note) for layer in layers.values()]
    training = network.training
    with torch.no_grad():
        network.eval()(example)
    network.train(training)
    for handle in handles:
        handle.remove()
    pairs = zip(sizes, layers.values(), strict=True)
    return [float(weight.numel() * places.get(layer, 0)) for weight, layer in pairs]
