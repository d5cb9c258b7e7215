"""Cost of the groups of a network, in multiply-adds or bytes: in total and per group.

Shapes: F families, Y layers, M groups of all families, P selections compared at once.

The cost of a layer is proportional to the fraction of its inputs it keeps times the fraction of its
outputs, so the cost of a network depends only on how many groups each family keeps. It is computed,
not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from bench.errors import UserError
from methods.wgsef.groups.convolution import PRUNABLE_LAYERS, run_with_hooks
from methods.wgsef.groups.partition import GroupFamily

CostUnit = Literal["macs", "bytes"]
COUPLED_KINDS = ("filters", "channels")


class GroupCosts:
    """Cost of a network's convolutions and dense layers as a function of the number of groups kept.

    Raises:
        UserError: removing groups of these kinds makes no layer smaller.
    """

    def __init__(
        self,
        network: nn.Module,
        families: Sequence[GroupFamily],
        example: Tensor,
        unit: CostUnit,
    ) -> None:
        kinds = {family.kind for family in families} - set(COUPLED_KINDS)
        if kinds:
            raise UserError(
                f"unit={unit} needs groups whose removal makes layers smaller "
                f"({' or '.join(COUPLED_KINDS)}), got {', '.join(sorted(kinds))}"
            )
        fixed = [family for family in families if family.unremovable_reason is not None]
        if fixed:
            raise UserError(
                f"unit={unit} needs groups that can be removed, but the {fixed[0].kind} of "
                f"{fixed[0].name} stay zeroed ({fixed[0].unremovable_reason}): use unit=groups"
            )
        self.unit = unit
        layers: dict[str, nn.Module] = {
            n: m for n, m in network.named_modules() if isinstance(m, PRUNABLE_LAYERS)
        }
        amounts = _layer_costs(network, layers, example, unit)
        self.size_F = torch.tensor([float(family.groups) for family in families])
        self._amount_Y = torch.tensor(amounts, dtype=torch.float64)
        # Fraction of each layer's outputs and inputs that one group of each family accounts for.
        self._out_YF = torch.zeros(len(layers), len(families), dtype=torch.float64)
        self._in_YF = torch.zeros_like(self._out_YF)
        for column, family in enumerate(families):
            for row, (name, layer) in enumerate(layers.items()):
                shape = layer.get_parameter("weight").shape
                for part in (*family.owned_slices, *family.reader_slices):
                    if part.tensor == f"{name}.weight":
                        # Axis 0 of a weight counts outputs, axis 1 inputs, of nn.Conv2d and
                        # nn.Linear alike.
                        share_YF = self._in_YF if part.axes == (1,) else self._out_YF
                        units = len(part.units) / family.groups
                        share_YF[row, column] += units / shape[part.axes[0]]

    def total(self, kept_PF: Tensor) -> Tensor:
        """Return the cost [P] of networks that keep these numbers of groups of each family."""
        gone_PF = (self.size_F - kept_PF).double()
        # Several families can feed one layer (a concatenation), so their fractions add up within
        # inputs and within outputs; the two factors then multiply.
        outputs_PY = 1 - gone_PF @ self._out_YF.T
        inputs_PY = 1 - gone_PF @ self._in_YF.T
        return (outputs_PY * inputs_PY) @ self._amount_Y

    def dense(self) -> float:
        """Return the cost of the unpruned network."""
        return float(self._amount_Y.sum())

    def per_group(self) -> Tensor:
        """Return the cost saved by removing one group of a family from the dense network, [F]."""
        # The total is bilinear in inputs and outputs, so this is exact for the first removal only.
        # Later ones save less, which is why a budget is checked with `total` and not with the sum
        # of these.
        without_one_FF = self.size_F - torch.eye(len(self.size_F))
        return self.dense() - self.total(without_one_FF)


def _layer_costs(
    network: nn.Module, layers: dict[str, nn.Module], example: Tensor, unit: CostUnit
) -> list[float]:
    """Return the multiply-adds for one example, or the bytes of the weights, of each layer."""
    sizes = [layer.get_parameter("weight") for layer in layers.values()]
    if unit == "bytes":
        return [float(weight.numel() * weight.element_size()) for weight in sizes]
    places: dict[nn.Module, int] = {}

    def count_places(layer: nn.Module, output: Tensor) -> None:
        # A convolution applies its weight at each output position; a dense layer has no spatial
        # axes, and the product over none is 1.
        places[layer] = output.shape[2:].numel()

    run_with_hooks(network, example, count_places)
    pairs = zip(sizes, layers.values(), strict=True)
    return [float(weight.numel() * places.get(layer, 0)) for weight, layer in pairs]
