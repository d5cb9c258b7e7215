"""Cost of the groups of a network, in multiply-adds, bytes or seconds: in total and per group.

Shapes: F families, C columns, Y weights, M groups of all families, P selections compared at once.

The cost of a layer is proportional to the fraction of its inputs it keeps times the fraction of its
outputs, so the cost of a network depends only on how many groups each family keeps. Residual blocks
are unlike each other: each of them is a column of its own, every other family is one. Multiply-adds
and bytes are computed; seconds are measured on the whole network and assumed to fall alike.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal

import torch
from torch import Tensor, nn

from bench.device.devices import synchronize
from bench.errors import UserError
from bench.models.classifiers.pruned_modules import ATTENTION
from methods.wgsef.groups.convolution import PRUNABLE_LAYERS
from methods.wgsef.groups.partition import GroupFamily

CostUnit = Literal["macs", "bytes", "seconds"]
REMOVABLE_KINDS = ("filters", "channels", "depth", "heads")
TIMED_RUNS = 5
"""Forwards of which a layer's shortest time counts."""


class GroupCosts:
    """Cost of a network's convolutions, dense layers and attention by the number of groups kept.

    `column_M` is the column of every group.

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
        kinds = {family.kind for family in families} - set(REMOVABLE_KINDS)
        if kinds:
            raise UserError(
                f"unit={unit} needs groups whose removal makes layers smaller "
                f"({' or '.join(REMOVABLE_KINDS)}), got {', '.join(sorted(kinds))}"
            )
        fixed = [family for family in families if family.unremovable_reason is not None]
        if fixed:
            raise UserError(
                f"unit={unit} needs groups that can be removed, but the {fixed[0].kind} of "
                f"{fixed[0].name} stay zeroed ({fixed[0].unremovable_reason}): use unit=groups"
            )
        self.unit = unit
        amounts = _costs_of_weights(network, example, unit)
        self._amount_Y = torch.tensor(list(amounts.values()), dtype=torch.float64)
        widths = [f.groups if f.kind == "depth" else 1 for f in families]
        sizes = [
            torch.full((w,), float(f.groups // w)) for f, w in zip(families, widths, strict=True)
        ]
        self.size_C = torch.cat(sizes)
        self._columns = torch.arange(len(self.size_C)).split(widths)
        pairs = zip(families, self._columns, strict=True)
        self.column_M = torch.cat(
            [column_C.repeat_interleave(f.groups // len(column_C)) for f, column_C in pairs]
        )
        # Fraction of each weight's outputs and inputs that one group of each column accounts for.
        self._out_YC = torch.zeros(len(amounts), len(self.size_C), dtype=torch.float64)
        self._in_YC = torch.zeros_like(self._out_YC)
        rows = {name: row for row, name in enumerate(amounts)}
        for family, column_C in zip(families, self._columns, strict=True):
            for part in (*family.owned_slices, *family.reader_slices):
                if part.tensor not in rows:
                    continue
                row = rows[part.tensor]
                if not part.axes:
                    # A whole weight goes with its block.
                    self._out_YC[row, column_C[part.groups]] = 1
                    continue
                shape = network.get_parameter(part.tensor).shape
                # Axis 0 of a weight counts outputs, axis 1 inputs, in all layers alike.
                share_YC = self._in_YC if part.axes == (1,) else self._out_YC
                share_YC[row, column_C] += len(part.units) / family.groups / shape[part.axes[0]]

    def total(self, kept_PC: Tensor) -> Tensor:
        """Return the cost [P] of networks that keep these numbers of groups of each column."""
        gone_PC = (self.size_C - kept_PC).double()
        # Several families can feed one layer (a concatenation), so their fractions add up within
        # inputs and within outputs; the two factors then multiply.
        outputs_PY = 1 - gone_PC @ self._out_YC.T
        inputs_PY = 1 - gone_PC @ self._in_YC.T
        return (outputs_PY * inputs_PY) @ self._amount_Y

    def dense(self) -> float:
        """Return the cost of the unpruned network."""
        return float(self._amount_Y.sum())

    def least(self, floors: Sequence[int]) -> float:
        """Return the least cost of a network that keeps so many groups of each family."""
        per_group_C, kept_C = self.per_group(), torch.zeros_like(self.size_C)
        for column_C, floor in zip(self._columns, floors, strict=True):
            if len(column_C) == 1:
                kept_C[column_C] = min(float(floor), float(self.size_C[column_C]))
            else:
                kept_C[column_C[per_group_C[column_C].argsort()[:floor]]] = 1
        return float(self.total(kept_C[None]))

    def per_group(self) -> Tensor:
        """Return the cost saved by removing one group of a column from the dense network, [C]."""
        # The total is bilinear in inputs and outputs, so this is exact for the first removal only.
        # Later ones save less, which is why a budget is checked with `total` and not with the sum
        # of these.
        without_one_CC = self.size_C - torch.eye(len(self.size_C))
        return self.dense() - self.total(without_one_CC)


def _costs_of_weights(network: nn.Module, example: Tensor, unit: CostUnit) -> dict[str, float]:
    """Return the multiply-adds or seconds for one example, or the bytes, by name of the weight."""
    layers = {n: m for n, m in network.named_modules() if isinstance(m, PRUNABLE_LAYERS)}
    attention = {
        name: module
        for name, module in network.named_modules()
        # Keys or values of widths of their own have no stacked projection, and no groups either.
        if isinstance(module, ATTENTION) and module.in_proj_weight is not None
    }
    weights = {f"{name}.weight": layer.get_parameter("weight") for name, layer in layers.items()}
    weights |= {
        f"{n}.in_proj_weight": m.get_parameter("in_proj_weight") for n, m in attention.items()
    }
    if unit == "bytes":
        return {name: float(w.numel() * w.element_size()) for name, w in weights.items()}
    runs = TIMED_RUNS if unit == "seconds" else 1
    places, pairs, seconds = _observed(
        network, example, [*layers.values(), *attention.values()], runs
    )
    costs = dict.fromkeys(weights, 0.0)
    if unit == "seconds":
        costs |= {f"{name}.weight": seconds.get(layer, 0.0) for name, layer in layers.items()}
        for name, module in attention.items():
            # torch's module calls no submodule and ours does: the time of both is that of the
            # whole, which falls with its heads.
            costs[f"{name}.in_proj_weight"] = seconds.get(module, 0.0)
            costs[f"{name}.out_proj.weight"] = 0.0
        return costs
    for name, layer in layers.items():
        costs[f"{name}.weight"] = float(
            layer.get_parameter("weight").numel() * places.get(layer, 0)
        )
    for name, module in attention.items():
        stacked, tokens = weights[f"{name}.in_proj_weight"], places.get(module, 0)
        # Each position is compared with those of its sequence, which may be a window of an image,
        # and mixes them, over the width of all heads.
        mixing = 2 * pairs.get(module, 0) * (len(stacked) // 3)
        costs[f"{name}.in_proj_weight"] = float(stacked.numel() * tokens + mixing)
        costs[f"{name}.out_proj.weight"] = float(
            weights[f"{name}.out_proj.weight"].numel() * tokens
        )
    return costs


def _observed(
    network: nn.Module, example: Tensor, modules: Sequence[nn.Module], runs: int
) -> tuple[dict[nn.Module, int], dict[nn.Module, int], dict[nn.Module, float]]:
    """Return for each module its positions in an example, pairs attended to, and least seconds."""
    places: dict[nn.Module, int] = {}
    pairs: dict[nn.Module, int] = {}
    seconds: dict[nn.Module, float] = {}
    began: dict[nn.Module, float] = {}

    def before(module: nn.Module, _: object) -> None:
        synchronize(example.device)
        began[module] = time.perf_counter()

    def after(
        module: nn.Module, args: tuple[Tensor, ...], given: dict[str, Tensor], output: Tensor
    ) -> None:
        synchronize(example.device)
        took = time.perf_counter() - began[module]
        seconds[module] = min(took, seconds.get(module, took))
        if isinstance(module, nn.Conv2d):
            places[module] = output.shape[2:].numel()
        else:
            # All axes but the last are positions: tokens of transformers, none of a classifier.
            query = args[0] if args else given.get("query", output)
            x = query if isinstance(module, ATTENTION) else output
            places[module] = x.numel() // x.shape[-1] // len(example)
            if isinstance(module, ATTENTION):
                key = args[1] if len(args) > 1 else given.get("key", query)
                # Without a batch, [positions, width].
                axis = -2 if key.ndim == 2 or module.batch_first else 0
                pairs[module] = places[module] * key.shape[axis]

    training = network.training
    with ExitStack() as stack, torch.no_grad():
        stack.callback(network.train, training)
        for module in modules:
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        # In training mode BatchNorm would update its running statistics from a single example.
        network.eval()
        for _ in range(runs):
            network(example)
    return places, pairs, seconds
