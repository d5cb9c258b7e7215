"""CAMERA-PQ: pruning and quantization in one decision, 0 to 8 bits per block of micro-experts.

Not in the paper, whose fixed groups can neither drop a micro-expert nor trade its bits for others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from bench.errors import UserError
from bench.method import Context
from bench.models.anatomy import Anatomy, MoEBlock
from bench.models.model import Model
from bench.models.observation import observing
from bench.models.packed import Level
from methods.camera.bits import block_size
from methods.camera.quant_replacement import Options, Replacement
from methods.moe_pruning import calibration_of
from methods.quantization.choice import choose
from methods.quantization.levels import exact
from methods.quantization.method import MoEQuantization, falling
from methods.quantization.observers import Blind, Planner
from methods.quantization.plan import ExpertPlan, tied
from methods.walking import walk

BitsOrNone = Annotated[int, Field(ge=0, le=8)]
ChoicesOrNone = Annotated[tuple[BitsOrNone, ...], Field(min_length=1), AfterValidator(falling)]


class CameraPQ(MoEQuantization):
    """Choose bits per block of micro-experts, 0 meaning removal, under a byte budget, exactly.

    The choice minimises the summed error of replacing each micro-expert alone, which at 0 bits is
    its energy at α = 0. `budget_bits` is the mean bits per routed weight, scales and offsets
    included. The budget holds per `layer`, each measured on the outputs of the quantized layers
    before it, or with scope `model` over all layers together, measured in one pass before anything
    changes. `block` is as in CAMERA-Q.
    """

    bits: ChoicesOrNone = (4, 3, 2, 1, 0)
    budget_bits: float = Field(default=2.25, gt=0, allow_inf_nan=False)
    scope: Literal["layer", "model"] = "layer"
    block: int | None = Field(default=None, ge=1)

    def check(self, anatomy: Anatomy) -> None:
        """Also refuse a budget below the cost of the fewest bits."""
        super().check(anatomy)
        for block in anatomy.moe:
            # Per block the cheapest option, which is the fewest bits: 0 costs nothing, not even a
            # grid.
            least = int(self.options(block).costs(block).amin(1).sum())
            if least > self.budget(block):
                need = least / (3 * block.d_model * sum(block.widths))
                raise UserError(
                    f"budget_bits={self.budget_bits} is too low for {block.name}: with scales and "
                    f"offsets, bits={list(self.bits)} need {need:.3g} at least"
                )

    def options(self, block: MoEBlock) -> Options:
        """Return the options of a block."""
        size = self.block or block_size(block.widths, self.group)
        return Options(self.bits, self.group, size, self.clip)

    def budget(self, block: MoEBlock) -> int:
        """Return the budget in bits of a block's routed experts."""
        return math.floor(exact(self.budget_bits) * 3 * block.d_model * sum(block.widths))

    def planner(self, block: MoEBlock) -> Planner:
        """Return the planner that measures a block and solves for its own budget."""
        return Solving(self, block)

    def planners(self, model: Model, context: Context) -> Callable[[MoEBlock], Planner]:
        """With scope `model`, measure and solve for all blocks before anything changes."""
        if self.scope == "layer":
            return self.planner
        measured = self._measure(model, context)
        blocks = [found.block for found in measured]
        chosen = solve(measured, sum(self.budget(block) for block in blocks))
        made = zip(blocks, measured, chosen, strict=True)
        decided = {block.name: Decided(found, chosen_I) for block, found, chosen_I in made}
        return lambda block: decided[block.name]

    def _measure(self, model: Model, context: Context) -> list[Replacement]:
        def start(block: MoEBlock) -> Replacement:
            return Replacement(block, self.options(block))

        def watching(seen: dict[MoEBlock, Replacement]) -> AbstractContextManager[None]:
            return observing(seen, self.chunk)

        tokens_BL = calibration_of(context).tokens
        found = walk(model, tokens_BL, start, watching, self.batch, False, context.progress)
        # Errors need the original weights, which the walk offloads or the caller quantizes later.
        return [measured.settled() for _, measured in found]


class Solving(Replacement):
    """Measures a layer, then solves for its own budget."""

    def __init__(self, method: CameraPQ, block: MoEBlock) -> None:
        super().__init__(block, method.options(block))
        self._budget = method.budget(block)
        self._decided: Decided

    def plans(self) -> list[ExpertPlan]:
        """Solve, and return a plan for every expert."""
        (chosen_I,) = solve([self], self._budget)
        self._decided = Decided(self, chosen_I)
        return self._decided.plans()

    def details(self) -> dict[str, Any]:
        """Return what was removed, and the predicted error."""
        return self._decided.details()


class Decided(Blind):
    """Plans a choice already made: an option for every block of micro-experts."""

    def __init__(self, measured: Replacement, chosen_I: list[int]) -> None:
        self._measured, self._chosen_I = measured, chosen_I
        self._bits_I = [measured.options.bits[option] for option in chosen_I]

    def plans(self) -> list[ExpertPlan]:
        """Return a plan for every expert: falling bits, then falling energy."""
        # The choices are one flat list over experts; each expert consumes as many as it has blocks.
        remaining = iter(self._bits_I)
        return [self._plan([(next(remaining), p) for p in own]) for own in self._measured.blocks]

    def details(self) -> dict[str, Any]:
        """Return what was removed, and the predicted error."""
        measured = self._measured
        parts = [part for own in measured.blocks for part in own]
        removed = [len(p) for p, bits in zip(parts, self._bits_I, strict=True) if not bits]
        places = torch.arange(len(self._chosen_I))
        error = float(measured.losses[places, self._chosen_I].sum())
        return {
            "block": measured.options.block,
            "removed": sum(removed),
            "foreseen_relative_error": error / measured.energy if measured.energy else 0.0,
        }

    def _plan(self, parts: Sequence[tuple[int, Tensor]]) -> ExpertPlan:
        options, block = self._measured.options, self._measured.block
        # A stable sort keeps blocks of equal bits in order of energy, so that each level is
        # contiguous.
        kept = sorted((part for part in parts if part[0]), key=lambda part: -part[0])
        order_f = torch.cat([chosen_n for _, chosen_n in kept] or [torch.zeros(0).long()])
        # The group size of down is the block size: one grid per row and block, as `Options.costs`
        # counts. Only an expert's last block is smaller, and it comes last in its level.
        levels = [Level(b, sum(len(p) for own, p in kept if own == b)) for b in options.bits if b]
        return tied(order_f, levels, block.d_model, options.group, options.block)


def solve(measured: Sequence[Replacement], budget: int) -> list[list[int]]:
    """Return the choices of every layer with the least total error under one budget in bits.

    Errors count relative to the energy of their layer, so that a layer with large outputs does not
    take the whole budget. For a single layer this changes nothing.
    """
    losses = [found.losses / (found.energy or 1.0) for found in measured]
    costs = [found.options.costs(found.block) for found in measured]
    chosen = choose(torch.cat(losses).numpy(), torch.cat(costs).numpy(), budget)
    parts = torch.split(torch.from_numpy(chosen), [len(cost_IO) for cost_IO in costs])
    return [part.tolist() for part in parts]
