"""Mixture Compressor (MC, arXiv 2410.06270): bits per expert by an exact integer program.

Shapes: E experts, B bit widths, S tokens of one expert.

In every layer the bits b_e minimise Σ_e freq_e^α · weight_e^β · ε_e(b_e), where freq_e is the share
of routed tokens that reach expert e, weight_e their mean router weight, and ε_e(b) the Frobenius
norm of the error in its outputs when it is rounded to b bits. The total stays within the budget,
and each bit width but the smallest is used by at least one expert. The official code solves the
program with Gurobi; here ε is measured with rounding to nearest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bench.errors import UserError
from bench.method import Context
from bench.models.model import Model
from bench.models.structure.expert_view import ExpertView
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import MoEBlock
from methods.moe.calibration import NullObserver, require_finite
from methods.moe.pruning import require_experts
from methods.moe.quantizer.bit_budget import exact_fraction, solve_multiple_choice_knapsack
from methods.moe.quantizer.expert_plan import ExpertPlan, uniform_plan
from methods.moe.quantizer.grid import RoundedWeights
from methods.moe.quantizer.method import BitChoices, MoEQuantization, require_mean_between
from methods.moe.quantizer.observers import Planner


class Mc(MoEQuantization):
    """Allocate bits per expert by frequency, router weight and rounding error; then run GPTQ.

    `alpha` and `beta` are the exponents of frequency and router weight.
    """

    bits: BitChoices = (3, 2, 1)
    mean_bits: float = 2.0
    alpha: float = Field(default=1.0, ge=0)
    beta: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _check_mean_bits(self) -> Self:
        require_mean_between(self.mean_bits, self.bits)
        return self

    def blocks(self, structure: ModelStructure) -> tuple[MoEBlock, ...]:
        """Return the MoE blocks: with one expert per layer there is nothing to choose."""
        require_experts(structure, type(self).__name__, "allocates bits to")
        return structure.moe

    def check(self, structure: ModelStructure) -> None:
        """Also refuse a budget that cannot give every bit width but the smallest to an expert."""
        super().check(structure)
        for block in structure.moe:
            *most, lowest = self.bits
            # The cheapest admissible choice: the narrowest experts take the larger bit widths once
            # each, every other expert the smallest. If that exceeds the budget, nothing fits.
            narrowest = sorted(block.widths)[: len(most)]
            least = lowest * sum(block.widths)
            least += sum((b - lowest) * w for b, w in zip(most, narrowest, strict=False))
            if len(narrowest) < len(most) or least > self.budget(block):
                raise UserError(
                    f"mean_bits={self.mean_bits} is too low for {block.name}: one expert at each "
                    f"of bits={list(self.bits)} and the rest at {lowest} exceed it; raise mean_bits"
                )

    def budget(self, block: MoEBlock) -> int:
        """Return the budget in bits for one weight per micro-expert of a block."""
        return math.floor(exact_fraction(self.mean_bits) * sum(block.widths))

    def planners(self, model: Model, context: Context) -> Callable[[MoEBlock], Planner]:
        """Return the factory of observers that measure the three factors of each expert."""
        return partial(McPlanner, self)


class McPlanner(NullObserver):
    """Measures frequency, router weight and rounding error of the experts of a block."""

    def __init__(self, method: Mc, block: MoEBlock) -> None:
        self._method, self._block = method, block
        counts = (block.num_experts, len(method.bits))
        device = block.expert(0).down.device
        self.error_EB = torch.zeros(counts, dtype=torch.float64, device=device)
        self.tokens_E = torch.zeros_like(self.error_EB[:, 0])
        self.weight_E = torch.zeros_like(self.tokens_E)
        self._rounded = RoundedWeights(method.group, method.clip)
        self._bits: list[int] = []

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one routed expert, recomputed at every bit width."""
        view = self._block.expert(expert)
        y_SD = view.combine(hidden_SF).float()
        self.tokens_E[expert] += len(x_SD)
        self.weight_E[expert] += weight_S.sum(dtype=torch.float64)
        for place, bits in enumerate(self._method.bits):
            rounded = self._round_expert(expert, view, bits)
            # Without the router weight, which enters the loss as a factor of its own.
            error_SD = y_SD - rounded.combine(rounded.hidden(x_SD.float()))
            self.error_EB[expert, place] += error_SD.square().sum(dtype=torch.float64)

    def plans(self) -> list[ExpertPlan]:
        """Solve the program and return a plan for every expert."""
        loss_EB = self.losses()
        require_finite(self._block, loss_EB)
        bits_B = torch.tensor(self._method.bits)
        # Bits per weight times width: after pruning experts may differ in width, and the common
        # factor 3·D of all weights drops out of the program.
        cost_EB = torch.tensor(self._block.widths)[:, None] * bits_B
        one_each = dict.fromkeys(range(len(self._method.bits) - 1), 1)
        chosen_E = solve_multiple_choice_knapsack(
            loss_EB.cpu().numpy(), cost_EB.numpy(), self._method.budget(self._block), one_each
        )
        self._bits = [self._method.bits[place] for place in chosen_E]
        return [
            uniform_plan(self._block.expert(expert), bits, self._method.group)
            for expert, bits in enumerate(self._bits)
        ]

    def losses(self) -> Tensor:
        """Return freq^α · weight^β · ε for every expert and bit width, float64 [E, B]."""
        frequency_E = self.tokens_E / self.tokens_E.sum()
        # An expert that no token reached has no error and hence loss 0; the clamp only keeps 0 / 0
        # out.
        mean_weight_E = self.weight_E / self.tokens_E.clamp(min=1)
        alpha, beta = self._method.alpha, self._method.beta
        importance_E = frequency_E.pow(alpha) * mean_weight_E.pow(beta)
        return importance_E[:, None] * self.error_EB.sqrt()

    def details(self) -> dict[str, object]:
        """Return each expert's bits and token count."""
        return {"bits_per_expert": self._bits, "tokens_per_expert": self.tokens_E.int().tolist()}

    def _round_expert(self, expert: int, view: ExpertView, bits: int) -> ExpertView:
        gate, up, down = (
            self._rounded.values((expert, name), getattr(view, name), bits)
            for name in ("gate", "up", "down")
        )
        return ExpertView(gate, up, down, view.act)
