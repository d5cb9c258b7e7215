"""CAMERA-PQ: joint pruning and quantization, with 0 to 8 bits per block of micro-experts.

Not in the paper, whose groups have fixed sizes and always keep at least one bit.

Shapes: S tokens of one expert, F its width, N routed micro-experts of a layer, D d_model, O bit
options, I blocks of micro-experts, n micro-experts of one block.

A micro-expert adds φ_t w to the output of token t. Rounded to b bits it adds φ̂_t ŵ. Replacing this
micro-expert alone causes the squared error, summed over tokens,

    e(b) = Σ_t ‖φ_t w - φ̂_t ŵ‖² = ‖φ‖²‖w‖² - 2 ⟨φ, φ̂⟩⟨w, ŵ⟩ + ‖φ̂‖²‖ŵ‖²

At 0 bits that is ‖φ‖²‖w‖², CAMERA's energy at α = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from bench.errors import UserError
from bench.method import Context
from bench.models.bitpacking.packed_shape import GRID_BITS, Level
from bench.models.model import Model
from bench.models.structure.expert_view import ExpertView
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import MoEBlock
from methods.camera.allocation import block_lengths, block_size, energy_order
from methods.moe.calibration import (
    NullObserver,
    WalkOptions,
    require_finite,
    squared_column_norms,
    walk_blocks,
)
from methods.moe.pruning import require_calibration
from methods.moe.quantizer.bit_budget import exact_fraction, solve_multiple_choice_knapsack
from methods.moe.quantizer.expert_plan import ExpertPlan, matrix_weights, tied_plan
from methods.moe.quantizer.grid import Clip, RoundedWeights, round_weights
from methods.moe.quantizer.method import MoEQuantization, check_falling
from methods.moe.quantizer.observers import Planner

BitWidthOrZero = Annotated[int, Field(ge=0, le=8)]
BitChoicesOrZero = Annotated[
    tuple[BitWidthOrZero, ...], Field(min_length=1), AfterValidator(check_falling)
]


class CameraPQ(MoEQuantization):
    """Choose the bits of every block of micro-experts under a size budget; 0 bits removes a block.

    The choice minimises the sum of the errors of replacing each micro-expert alone; at 0 bits that
    error is the energy at α = 0. The minimum is exact. `budget_bits` is the mean number of bits per
    routed weight, including scales and offsets. Grids are of kind `offset`, the only kind that has
    1 bit.

    With scope `layer` every layer gets the same budget and is measured on the outputs of the
    quantized layers before it. With scope `global` all layers share one budget and are measured in
    one pass over the unchanged model. `block` is as in CAMERA-Q.
    """

    bits: BitChoicesOrZero = (4, 3, 2, 1, 0)
    grid: Literal["offset"] = "offset"
    budget_bits: float = Field(default=2.25, gt=0, allow_inf_nan=False)
    scope: Literal["layer", "global"] = "layer"
    block: int | None = Field(default=None, ge=1)

    def check(self, structure: ModelStructure) -> None:
        """Also refuse a budget below the cost of the fewest bits."""
        super().check(structure)
        for block in self.blocks(structure):
            least = int(self.options(block).cost_in_bits(block).amin(1).sum())
            if least > self.budget(block):
                need = least / matrix_weights(block)
                raise UserError(
                    f"budget_bits={self.budget_bits} is too low for {block.name}: with scales and "
                    f"offsets, bits={list(self.bits)} need at least {need:.3g}; raise budget_bits "
                    "or add lower bits"
                )

    def options(self, block: MoEBlock) -> BitOptions:
        """Return the options of a block."""
        size = self.block or block_size(block.widths, self.group)
        return BitOptions(self.bits, self.group, size, self.clip)

    def budget(self, block: MoEBlock) -> int:
        """Return the budget in bits of a block's routed experts."""
        return math.floor(exact_fraction(self.budget_bits) * matrix_weights(block))

    def planners(self, model: Model, context: Context) -> Callable[[MoEBlock], Planner]:
        """With scope `global`, measure and solve for all blocks before anything changes."""
        if self.scope == "layer":
            return partial(SolvingPlanner, self)
        measured = self._measure(model, context)
        blocks = [found.block for found in measured]
        chosen = solve_bit_budget(measured, sum(self.budget(block) for block in blocks))
        made = zip(blocks, measured, chosen, strict=True)
        decided = {block.name: DecidedPlanner(found, chosen_I) for block, found, chosen_I in made}
        return lambda block: decided[block.name]

    def _measure(self, model: Model, context: Context) -> list[ReplacementErrors]:
        def make_observer(block: MoEBlock) -> ReplacementErrors:
            return ReplacementErrors(block, self.options(block))

        tokens_BL = require_calibration(context).tokens
        options = WalkOptions(self.batch, self.chunk)
        observed = walk_blocks(model, tokens_BL, make_observer, options, context.progress)
        # Computed here, while the original weights are loaded: the walk may offload them, and the
        # caller quantizes them.
        return [errors.materialized() for _, errors in observed]


class ReplacementErrors(NullObserver):
    """Measures the errors e(b) of a layer's routed micro-experts."""

    def __init__(self, block: MoEBlock, options: BitOptions) -> None:
        self.block, self.options = block, options
        device = block.expert(0).down.device
        self._rounded = RoundedWeights(options.group, options.clip)
        self._overlaps = [Overlaps(width, len(options.bits), device) for width in block.widths]

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one routed expert, recomputed for every bit option."""
        view, overlaps = self.block.expert(expert), self._overlaps[expert]
        weight_S1 = weight_S.float()[:, None]
        phi_SF = hidden_SF.float() * weight_S1
        overlaps.square_F += phi_SF.square().sum(0, dtype=torch.float64)
        for option, bits in enumerate(self.options.bits):
            if bits:
                # φ̂ depends on gate and up only, so down is not rounded here. Its rounding enters
                # through ⟨w, ŵ⟩ and ‖ŵ‖², which need no tokens.
                rounded = self._round_inputs(expert, view, bits)
                hat_SF = rounded.hidden(x_SD.float()) * weight_S1
                overlaps.cross_OF[option] += (phi_SF * hat_SF).sum(0, dtype=torch.float64)
                overlaps.rounded_OF[option] += hat_SF.square().sum(0, dtype=torch.float64)

    @cached_property
    def blocks(self) -> list[tuple[Tensor, ...]]:
        """Per expert, the indices of its micro-experts by descending energy, split into blocks."""
        blocks = []
        for expert in range(len(self._overlaps)):
            order_F = energy_order(self._energies(expert))
            sizes = block_lengths(len(order_F), self.options.block)
            blocks.append(torch.split(order_F, sizes) if sizes else ())
        return blocks

    @cached_property
    def losses(self) -> Tensor:
        """The summed error of every block at every bit option, float64 [I, O] on the CPU."""
        rows = [
            self._losses(expert, chosen_n)
            for expert, parts in enumerate(self.blocks)
            for chosen_n in parts
        ]
        loss_IO = torch.stack(rows).cpu()
        require_finite(self.block, loss_IO)
        return loss_IO

    @cached_property
    def energy(self) -> float:
        """The summed error of removing each micro-expert alone."""
        return sum(float(self._energies(expert).sum()) for expert in range(len(self._overlaps)))

    def _energies(self, expert: int) -> Tensor:
        """Return the error of removing each micro-expert of an expert alone, float64 [F]."""
        down_DF = self.block.expert(expert).down
        return self._overlaps[expert].square_F * squared_column_norms(down_DF)

    def materialized(self) -> ReplacementErrors:
        """Compute everything that needs the block's weights, and return self."""
        # Cached properties: reading them stores their values.
        _ = self.blocks, self.losses, self.energy
        # Frees the rounded weights. With scope `global` those of all layers would otherwise be kept
        # at once, as large as the model.
        self._rounded = RoundedWeights(self.options.group, self.options.clip)
        return self

    def _losses(self, expert: int, chosen_n: Tensor) -> Tensor:
        """Return the errors of one block, float64 [O]."""
        overlaps, group = self._overlaps[expert], self.options.block
        down_Dn = self.block.expert(expert).down[:, chosen_n].float()
        energy_n = overlaps.square_F[chosen_n] * squared_column_norms(down_Dn)
        losses = []
        for option, bits in enumerate(self.options.bits):
            loss_n = energy_n
            if bits:
                # Rounded as one group, because the block will be one group of the stored down
                # matrix and the error depends on which micro-experts share a grid.
                hat_Dn = round_weights(down_Dn, bits, group, self.options.clip)
                inner_n = (down_Dn * hat_Dn).sum(0, dtype=torch.float64)
                cross_n = overlaps.cross_OF[option, chosen_n] * inner_n
                square_n = overlaps.rounded_OF[option, chosen_n] * squared_column_norms(hat_Dn)
                loss_n = energy_n - 2 * cross_n + square_n
            losses.append(loss_n.sum())
        return torch.stack(losses)

    def _round_inputs(self, expert: int, view: ExpertView, bits: int) -> ExpertView:
        up = self._rounded.values((expert, "up"), view.up, bits)
        gate = view.gate
        if view.form != "plain":
            gate = self._rounded.values((expert, "gate"), view.gate, bits)
        # The rounded matrices and the caller's inputs are float32, whatever dtype the model has.
        gate_bias = None if view.gate_bias is None else view.gate_bias.float()
        up_bias = None if view.up_bias is None else view.up_bias.float()
        return replace(view, gate=gate, up=up, gate_bias=gate_bias, up_bias=up_bias)


class SolvingPlanner(ReplacementErrors):
    """Measures a layer, then chooses its bits under the layer's own budget."""

    def __init__(self, method: CameraPQ, block: MoEBlock) -> None:
        super().__init__(block, method.options(block))
        self._budget = method.budget(block)
        self._decided: DecidedPlanner

    def plans(self) -> list[ExpertPlan]:
        """Choose the bits and return a plan for every expert."""
        (chosen_I,) = solve_bit_budget([self], self._budget)
        self._decided = DecidedPlanner(self, chosen_I)
        return self._decided.plans()

    def details(self) -> dict[str, object]:
        """Return what was removed, and the predicted error."""
        return self._decided.details()


class DecidedPlanner(NullObserver):
    """Turns chosen bit options, one per block of micro-experts, into plans of the experts."""

    def __init__(self, measured: ReplacementErrors, chosen_I: list[int]) -> None:
        self._measured, self._chosen_I = measured, chosen_I
        self._bits_I = [measured.options.bits[option] for option in chosen_I]

    def plans(self) -> list[ExpertPlan]:
        """Return a plan for every expert, sorted by descending bits, then descending energy."""
        plans, start = [], 0
        # `_bits_I` is one flat list over all experts.
        for expert, parts_n in enumerate(self._measured.blocks):
            bits = self._bits_I[start : start + len(parts_n)]
            start += len(parts_n)
            view = self._measured.block.expert(expert)
            plans.append(self._plan(view, list(zip(bits, parts_n, strict=True))))
        return plans

    def details(self) -> dict[str, object]:
        """Return what was removed, and the predicted error."""
        measured = self._measured
        parts = [part for own in measured.blocks for part in own]
        removed = [len(p) for p, bits in zip(parts, self._bits_I, strict=True) if not bits]
        rows = torch.arange(len(self._chosen_I))
        error = float(measured.losses[rows, self._chosen_I].sum())
        return {
            "block": measured.options.block,
            "removed": sum(removed),
            "predicted_relative_error": error / measured.energy if measured.energy else 0.0,
        }

    def _plan(self, view: ExpertView, parts: Sequence[tuple[int, Tensor]]) -> ExpertPlan:
        options = self._measured.options
        # A stable sort keeps blocks of equal bits in order of energy, so that each level is
        # contiguous.
        kept = sorted((part for part in parts if part[0]), key=lambda part: -part[0])
        order_f = torch.cat([chosen_n for _, chosen_n in kept] or [torch.zeros(0).long()])
        # The group size of down is the block size: one grid per row and block, as `cost_in_bits`
        # counts. Only an expert's last block is smaller, and it comes last in its level.
        levels = [Level(b, sum(len(p) for own, p in kept if own == b)) for b in options.bits if b]
        return tied_plan(view, order_f, levels, options.group, options.block)


def solve_bit_budget(measured: Sequence[ReplacementErrors], budget: int) -> list[list[int]]:
    """Return the bit option of every block, per layer, of least total error under one budget.

    `budget` is in bits and covers all layers. Errors are divided by the energy of their layer, so
    that a layer with large outputs does not take the whole budget; for a single layer this changes
    nothing.

    Raises:
        UserError: no choice is within the budget.
    """
    losses = [found.losses / (found.energy or 1.0) for found in measured]
    costs = [found.options.cost_in_bits(found.block) for found in measured]
    chosen = solve_multiple_choice_knapsack(
        torch.cat(losses).numpy(), torch.cat(costs).numpy(), budget
    )
    parts = torch.split(torch.from_numpy(chosen), [len(cost_IO) for cost_IO in costs])
    return [part.tolist() for part in parts]


@dataclass(frozen=True)
class BitOptions:
    """Bit widths to choose from, and how weights are rounded.

    `group` is the group size along the inputs of gate and up, `block` that along the columns of
    down.
    """

    bits: tuple[int, ...]
    group: int
    block: int
    clip: Clip

    def cost_in_bits(self, block: MoEBlock) -> Tensor:
        """Return the storage in bits of every block at every option, with grids, int64 [I, O].

        Each micro-expert of a block has a row in gate and in up, or in up alone, with one grid per
        group of inputs; the down matrix has one grid per row for the columns of the block.
        """
        sizes = [n for width in block.widths for n in block_lengths(width, self.block)]
        size_I1 = torch.tensor(sizes, dtype=torch.int64)[:, None]
        # -(-a // b) is the ceiling. Dropped blocks (0 bits) store no grid.
        rows = block.matrices - 1
        grids_I1 = rows * size_I1 * -(-block.d_model // self.group) + block.d_model
        bits_O = torch.tensor(self.bits)
        return block.matrices * block.d_model * size_I1 * bits_O + GRID_BITS * grids_I1 * (
            bits_O > 0
        )


class Overlaps:
    """‖φ‖², and for every bit option ⟨φ, φ̂⟩ and ‖φ̂‖², of one expert's micro-experts."""

    def __init__(self, width: int, options: int, device: torch.device) -> None:
        self.square_F = torch.zeros(width, dtype=torch.float64, device=device)
        self.cross_OF = torch.zeros(options, width, dtype=torch.float64, device=device)
        self.rounded_OF = torch.zeros_like(self.cross_OF)
