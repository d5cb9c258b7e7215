"""Mixture Compressor (MC, arXiv 2410.06270): bits per expert by an exact integer program.

Shapes: E experts, B bit widths, S tokens of one expert.

In every layer the bits b_e minimise Σ_e freq_e^α · weight_e^β · ε_e(b_e), where freq_e is the share
of routed tokens that reach expert e, weight_e their mean router weight, and ε_e(b) the Frobenius
norm of the error of its outputs when it is rounded to b bits. The total must be within the budget,
and each bit width except the smallest must be used by at least one expert. Here ε is measured with
rounding to nearest.

The official code (Aaronhuang-778/MC-MoE at 7aa062c) solves the program with Gurobi, and uses other
factors than the paper: weight_e is the sum over tokens of the softmax over all experts, which
includes the frequency once more, with β = 1.5; ε_e is measured at the output of the block, with the
router weight, as a sum of one norm per batch. `variant=code` uses these factors, from which the bit
widths in the repository for Mixtral-8x7B follow. The rounding still differs: offsets are integers
in that code and real numbers here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Literal, Self, cast

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

    `variant` selects the factors: `mean_weight` uses the mean of the router weights that the model
    applies and the error of the expert's own output, `code` those of the official code. `alpha` and
    `beta` are the exponents of frequency and router weight. The default of β is 1, or 1.5 with
    `code`.
    """

    bits: BitChoices = (3, 2, 1)
    mean_bits: float = 2.0
    alpha: float = Field(default=1.0, ge=0)
    beta: float | None = Field(default=None, ge=0)
    variant: Literal["mean_weight", "code"] = "mean_weight"

    @model_validator(mode="after")
    def _check_mean_bits(self) -> Self:
        require_mean_between(self.mean_bits, self.bits)
        return self

    @property
    def weight_exponent(self) -> float:
        """β, with the default of the variant."""
        if self.beta is not None:
            return self.beta
        return 1.5 if self.variant == "code" else 1.0

    def blocks(self, structure: ModelStructure) -> tuple[MoEBlock, ...]:
        """Return the MoE blocks; the method needs several experts per layer to choose among."""
        require_experts(structure, type(self).__name__, "allocates bits to")
        return structure.moe

    def check(self, structure: ModelStructure) -> None:
        """Also refuse a budget in which not every bit width can be used by an expert."""
        super().check(structure)
        for block in structure.moe:
            if self.variant == "code" and len(signature(block.router.forward).parameters) > 1:
                raise UserError(
                    "variant=code needs a router that reads only hidden states, unlike that of "
                    f"{block.name}: use variant=mean_weight"
                )
            *most, lowest = self.bits
            # The cheapest admissible choice: the narrowest experts get one of the larger bit widths
            # each, all other experts the smallest one.
            narrowest = sorted(block.widths)[: len(most)]
            least = lowest * sum(block.widths)
            least += sum((b - lowest) * w for b, w in zip(most, narrowest, strict=False))
            if len(narrowest) < len(most) or least > self.budget(block):
                raise UserError(
                    f"mean_bits={self.mean_bits} is too low for {block.name}: one expert at each "
                    f"of bits={list(self.bits)} and the rest at {lowest} exceed it; raise mean_bits"
                )

    def budget(self, block: MoEBlock) -> int:
        """Return a block's budget in bits per weight of a micro-expert, summed over these."""
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
        # Σ ‖error‖² over all tokens or, with `code`, over the current batch, and the sum of norms
        # over batches that `code` uses.
        self.square_EB = torch.zeros(counts, dtype=torch.float64, device=device)
        self.norm_EB = torch.zeros_like(self.square_EB)
        self.tokens_E = torch.zeros_like(self.square_EB[:, 0])
        self.weight_E = torch.zeros_like(self.tokens_E)
        self._rounded = RoundedWeights(method.group, method.clip, method.grid)
        self._bits: list[int] = []

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one routed expert, recomputed at every bit width."""
        view = self._block.expert(expert)
        y_SD = view.combine(hidden_SF).float()
        self.tokens_E[expert] += len(x_SD)
        official = self._method.variant == "code"
        share_S = self._softmax(expert, x_SD) if official else weight_S
        self.weight_E[expert] += share_S.sum(dtype=torch.float64)
        for place, bits in enumerate(self._method.bits):
            rounded = self._round_expert(expert, view, bits)
            error_SD = y_SD - rounded.combine(rounded.hidden(x_SD.float()))
            if official:
                error_SD = error_SD * weight_S.float()[:, None]
            self.square_EB[expert, place] += error_SD.square().sum(dtype=torch.float64)

    def output(self, y_TD: Tensor) -> None:
        """End a batch: `code` sums the norms of batches, not their squares."""
        if self._method.variant == "code":
            self.norm_EB += self.square_EB.sqrt()
            self.square_EB.zero_()

    def _softmax(self, expert: int, x_SD: Tensor) -> Tensor:
        """Return the softmax over all experts' logits at one expert, [S]."""
        logits_SE = self._block.router(x_SD)[0]
        return cast(Tensor, logits_SE.float().softmax(dim=1)[:, expert])

    def plans(self) -> list[ExpertPlan]:
        """Solve the program and return a plan for every expert."""
        loss_EB = self.losses()
        require_finite(self._block, loss_EB)
        bits_B = torch.tensor(self._method.bits)
        # Bits times width, because experts may differ in width after pruning. The common factor 3·D
        # has no effect on the solution.
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
        # An expert that no token reached has error 0 and hence loss 0; the clamp avoids 0 / 0.
        weight_E, error_EB = self.weight_E / self.tokens_E.clamp(min=1), self.square_EB.sqrt()
        if self._method.variant == "code":
            weight_E, error_EB = self.weight_E / self.weight_E.sum(), self.norm_EB
        importance_E = frequency_E.pow(self._method.alpha)
        importance_E = importance_E * weight_E.pow(self._method.weight_exponent)
        return importance_E[:, None] * error_EB

    def details(self) -> dict[str, object]:
        """Return each expert's bits and token count."""
        return {"bits_per_expert": self._bits, "tokens_per_expert": self.tokens_E.int().tolist()}

    def _round_expert(self, expert: int, view: ExpertView, bits: int) -> ExpertView:
        gate, up, down = (
            self._rounded.values((expert, name), getattr(view, name), bits)
            for name in ("gate", "up", "down")
        )
        return ExpertView(gate, up, down, view.act)
