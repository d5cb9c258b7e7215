"""Cost of the groups of a network, in multiply-adds, bytes or seconds: in total and per group.

Shapes: C columns, Y weights, M groups of all families, P selections compared at once.

The cost of a layer is proportional to the fraction of its inputs that it keeps times the fraction
of its outputs, so the cost of a network depends only on how many groups each family keeps. The
groups of a family cost the same and share a column of the cost table, except for residual blocks,
each of which has its own column. Multiply-adds and bytes are computed. Seconds are measured on the
dense network and assumed to fall in proportion.
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
from methods.wgsef.groups.choice import FamilyOutline
from methods.wgsef.groups.convolution import PRUNABLE_LAYERS
from methods.wgsef.groups.partition import GroupFamily

CostUnit = Literal["macs", "bytes", "seconds"]
REMOVABLE_KINDS = ("filters", "channels", "depth", "heads")
TIMED_RUNS = 5
"""Number of forwards; the shortest time of a layer counts."""


class GroupCosts:
    """Cost of a network's convolutions, dense layers and attention by the number of groups kept.

    `column_M` is the column of every group, `size_C` the number of groups of every column, and
    `amount_Y` the cost of every weight.

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
        refuse_uncosted(families, unit)
        self.unit = unit
        amounts = _costs_of_weights(network, example, unit)
        self.amount_Y = torch.tensor(list(amounts.values()), dtype=torch.float64)
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
            self._add_shares(network, family, column_C, rows)

    def _add_shares(
        self, network: nn.Module, family: GroupFamily, column_C: Tensor, rows: dict[str, int]
    ) -> None:
        """Add the fractions of weights that the groups of one family account for."""
        for part in (*family.owned_slices, *family.reader_slices):
            if part.tensor not in rows:
                continue
            row = rows[part.tensor]
            if not part.axes:
                # The whole weight is removed with its residual block.
                self._out_YC[row, column_C[part.groups]] = 1
                continue
            shape = network.get_parameter(part.tensor).shape
            # In all layers axis 0 of a weight counts outputs and axis 1 inputs.
            share_YC = self._in_YC if part.axes == (1,) else self._out_YC
            share_YC[row, column_C] += len(part.units) / family.groups / shape[part.axes[0]]

    def total(self, kept_PC: Tensor) -> Tensor:
        """Return the cost [P] of networks that keep these numbers of groups of each column."""
        removed_PC = (self.size_C - kept_PC).double()
        # Several families can feed one layer (a concatenation), so fractions are summed over
        # families, for inputs and outputs separately, before the two factors are multiplied.
        outputs_PY = 1 - removed_PC @ self._out_YC.T
        inputs_PY = 1 - removed_PC @ self._in_YC.T
        return (outputs_PY * inputs_PY) @ self.amount_Y

    def dense(self) -> float:
        """Return the cost of the unpruned network."""
        return float(self.amount_Y.sum())

    def least(self, floors: Sequence[int]) -> float:
        """Return the least cost of a network that keeps `floors` groups of each family."""
        per_group_C, kept_C = self.per_group(), torch.zeros_like(self.size_C)
        for column_C, floor in zip(self._columns, floors, strict=True):
            if len(column_C) == 1:
                kept_C[column_C] = min(float(floor), float(self.size_C[column_C]))
            else:
                kept_C[column_C[per_group_C[column_C].argsort()[:floor]]] = 1
        return float(self.total(kept_C[None]))

    def per_group(self) -> Tensor:
        """Return the cost saved by removing one group of a column from the dense network, [C]."""
        # The total is bilinear in inputs and outputs, so this is exact for the first removal only
        # and later ones save less. Budgets are therefore checked with `total`.
        without_one_CC = self.size_C - torch.eye(len(self.size_C))
        return self.dense() - self.total(without_one_CC)


def refuse_uncosted(families: Sequence[GroupFamily | FamilyOutline], unit: CostUnit) -> None:
    """Raise for groups whose removal makes no layer smaller."""
    kinds = {family.kind for family in families} - set(REMOVABLE_KINDS)
    if kinds:
        raise UserError(
            f"unit={unit} needs groups whose removal makes layers smaller "
            f"({' or '.join(REMOVABLE_KINDS)}), got {', '.join(sorted(kinds))}"
        )
    for family in families:
        if family.unremovable_reason is not None:
            raise UserError(
                f"unit={unit} needs groups that can be removed, but the {family.kind} of "
                f"{family.name} stay zeroed ({family.unremovable_reason}): use unit=groups"
            )


def _costs_of_weights(network: nn.Module, example: Tensor, unit: CostUnit) -> dict[str, float]:
    """Return the multiply-adds or seconds for one example, or the bytes, by name of the weight."""
    layers = {n: m for n, m in network.named_modules() if isinstance(m, PRUNABLE_LAYERS)}
    attention = {
        name: module
        for name, module in network.named_modules()
        # Attention whose keys or values have a different width has no stacked projection, and no
        # groups either.
        if isinstance(module, ATTENTION) and module.in_proj_weight is not None
    }
    weights = {f"{name}.weight": layer.get_parameter("weight") for name, layer in layers.items()}
    weights |= {
        f"{n}.in_proj_weight": m.get_parameter("in_proj_weight") for n, m in attention.items()
    }
    if unit == "bytes":
        return {name: float(w.numel() * w.element_size()) for name, w in weights.items()}
    runs = TIMED_RUNS if unit == "seconds" else 1
    positions, pairs, seconds = _observed(
        network, example, [*layers.values(), *attention.values()], runs
    )
    costs = dict.fromkeys(weights, 0.0)
    if unit == "seconds":
        costs |= {f"{name}.weight": seconds.get(layer, 0.0) for name, layer in layers.items()}
        for name, module in attention.items():
            # torch's attention calls no submodule and ours does. In both cases the time is that of
            # the whole module, which falls with the number of heads.
            costs[f"{name}.in_proj_weight"] = seconds.get(module, 0.0)
            costs[f"{name}.out_proj.weight"] = 0.0
        return costs
    for name, layer in layers.items():
        costs[f"{name}.weight"] = float(
            layer.get_parameter("weight").numel() * positions.get(layer, 0)
        )
    for name, module in attention.items():
        stacked, tokens = weights[f"{name}.in_proj_weight"], positions.get(module, 0)
        # Scores and weighted sums: one multiply-add each per pair of positions and channel.
        mixing = 2 * pairs.get(module, 0) * (len(stacked) // 3)
        costs[f"{name}.in_proj_weight"] = float(stacked.numel() * tokens + mixing)
        costs[f"{name}.out_proj.weight"] = float(
            weights[f"{name}.out_proj.weight"].numel() * tokens
        )
    return costs


def _observed(
    network: nn.Module, example: Tensor, modules: Sequence[nn.Module], runs: int
) -> tuple[dict[nn.Module, int], dict[nn.Module, int], dict[nn.Module, float]]:
    """Return the number of positions, of attended pairs, and the least seconds of each module.

    Positions and pairs are per example; a sequence may be a window of an image.
    """
    positions: dict[nn.Module, int] = {}
    pairs: dict[nn.Module, int] = {}
    seconds: dict[nn.Module, float] = {}
    started: dict[nn.Module, float] = {}

    def before(module: nn.Module, _: object) -> None:
        synchronize(example.device)
        started[module] = time.perf_counter()

    def after(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> None:
        synchronize(example.device)
        elapsed = time.perf_counter() - started[module]
        seconds[module] = min(elapsed, seconds.get(module, elapsed))
        if isinstance(module, nn.Conv2d):
            positions[module] = output.shape[2:].numel()
        else:
            # All axes but the last are positions: tokens in a transformer, none in a classifier.
            query = args[0] if args else kwargs.get("query", output)
            x = query if isinstance(module, ATTENTION) else output
            positions[module] = x.numel() // x.shape[-1] // len(example)
            if isinstance(module, ATTENTION):
                key = args[1] if len(args) > 1 else kwargs.get("key", query)
                # Without a batch the shape is [positions, width].
                axis = -2 if key.ndim == 2 or module.batch_first else 0
                pairs[module] = positions[module] * key.shape[axis]

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
    return positions, pairs, seconds
