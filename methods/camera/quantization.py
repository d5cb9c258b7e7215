"""CAMERA-Q (arXiv 2508.02322): more bits for micro-experts with more energy; and its ablation.

Shapes: D d_model, F an expert's width, S tokens of one expert.

CAMERA-Q has no official code. What is known: micro-experts are sorted by energy and cut into groups
of decreasing bits, such as 3, 2 and 1; the gate row, up row and down column of a micro-expert get
the same bits; the quantizer is GPTQ, at least in part.

CAMERA-Q-dagger, the paper's ablation, allocates bits over the input columns of each matrix instead,
so the weights of one micro-expert have different bits. An input column j of a matrix W is ranked by
its contribution to the output of the matrix, [(1 - α) ‖x_j‖₂² + α ‖x_j‖∞²] · ‖W_:j‖₂², which is
CAMERA's energy with the columns of W as micro-experts. The paper describes only the split by
columns; the ranking is ours.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bench.method import Context
from bench.models.bitpacking.packed_shape import Level, PackedShape
from bench.models.model import Model
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import MoEBlock
from methods.camera.allocation import (
    BitScope,
    block_size,
    distribute_levels,
    energy_order,
    rank_blocks,
)
from methods.camera.analysis import Alpha, BlockEnergies, energy, resolve_alpha
from methods.moe.calibration import Moments, squared_column_norms
from methods.moe.micro_experts import SHARED, expert_spans
from methods.moe.quantizer.bit_budget import exact_fraction, level_sizes, mean_bits_of
from methods.moe.quantizer.expert_plan import ExpertPlan, MatrixPlan, tied_plan
from methods.moe.quantizer.method import BitChoices, MoEQuantization, require_mean_between
from methods.moe.quantizer.observers import Planner
from methods.moe.ranking import random_scores


class MixedBitQuantization(MoEQuantization):
    """A method that mixes several bit widths at an exact mean.

    `shares` are the proportions in which `bits` are used; without them, the proportions are as even
    as `mean_bits` allows. If both are given they must agree. The default shares have a mean of 2
    bits (2.25 with the grids of groups of 128). A later comparison, DartMoQP, used them for
    CAMERA-Q; those of the paper are not known.

    `alpha` weighs the peak term of the energy, and `normalised` replaces the sum over tokens by the
    mean, both as in CAMERA-P.
    """

    bits: BitChoices = (3, 2, 1)
    shares: tuple[float, ...] | None = (0.125, 0.75, 0.125)
    mean_bits: float | None = None
    alpha: Alpha = "paper"
    normalised: bool = False

    @model_validator(mode="after")
    def _check_shares_and_mean(self) -> Self:
        bits, shares, mean = self.bits, self.shares, self.mean_bits
        if shares is not None:
            if len(shares) != len(bits):
                raise ValueError(
                    f"shares has {len(shares)} values and bits has {len(bits)}: give one per width"
                )
            if not all(0 <= share < float("inf") for share in shares) or not any(shares):
                raise ValueError(
                    f"shares={list(shares)} must be finite, not negative, and not all zero"
                )
        elif mean is None:
            raise ValueError("shares and mean_bits are both null: set one of them")
        if mean is not None:
            require_mean_between(mean, bits)
            # Compared as fractions: float means of the same decimals need not be equal.
            if shares is not None and mean_bits_of(bits, shares) != exact_fraction(mean):
                implied = float(mean_bits_of(bits, shares))
                raise ValueError(
                    f"bits={list(bits)} with shares={list(shares)} have a mean of {implied}, not "
                    f"{mean}: set mean_bits={implied} or mean_bits=null"
                )
        return self

    def planners(self, model: Model, context: Context) -> Callable[[MoEBlock], Planner]:
        """Return the factory of planners, with α resolved for this model."""
        alpha = resolve_alpha(self.alpha, model.structure.model_type)
        return partial(self.planner, alpha=alpha, seed=context.seed)

    @abstractmethod
    def planner(self, block: MoEBlock, alpha: float, seed: int) -> Planner:
        """Return an observer of one block that plans the bits of its experts afterwards."""

    @property
    def mean(self) -> Fraction:
        """The exact mean of the bits."""
        if self.mean_bits is not None:
            return exact_fraction(self.mean_bits)
        assert self.shares is not None
        return mean_bits_of(self.bits, self.shares)

    def levels(self, count: int) -> list[Level]:
        """Return the levels (bits, number of parts) into which `count` parts are divided."""
        sizes = level_sizes(self.bits, self.shares, self.mean, count)
        return [Level(*level) for level in zip(self.bits, sizes, strict=True)]


class CameraQ(MixedBitQuantization):
    """Allocate bits by energy; all weights of a micro-expert get the same bits.

    `scope` ranks the routed micro-experts of a whole `layer`, as CAMERA-P does, or gives every
    `expert` the same shares. `block` is the number of micro-experts of an expert that get the same
    bits: by default one group, or an eighth of an expert narrower than four groups.

    `ranking=random` is the control, which assigns the same bit widths at random. What
    `ranking=energy` gains over it is due to the ranking; what both lose to GPTQ is due to mixing
    bit widths.
    """

    scope: BitScope = "layer"
    block: int | None = Field(default=None, ge=1)
    ranking: Literal["energy", "random"] = "energy"

    def check(self, structure: ModelStructure) -> None:
        """Also refuse a mean that these bits cannot produce in some layer."""
        super().check(structure)
        for block in self.blocks(structure):
            # Raises if no division exists, which is better known before calibration.
            self.levels(sum(block.widths))

    def planner(self, block: MoEBlock, alpha: float, seed: int) -> Planner:
        """Return the observer that measures the energies of a block and allocates bits by them."""
        return EnergyPlanner(self, block, alpha, seed)


class EnergyPlanner(BlockEnergies):
    """Measures the energies of one block and plans the bits of its experts."""

    def __init__(self, method: CameraQ, block: MoEBlock, alpha: float, seed: int) -> None:
        super().__init__(block)
        self._method, self._alpha, self._seed = method, alpha, seed
        self._block_size = method.block or block_size(block.widths, method.group)

    def plans(self) -> list[ExpertPlan]:
        """Return a plan for every routed expert, in order of descending energy and bits."""
        method, block = self._method, self.block
        energy_N = self.energies(self._alpha, normalised=method.normalised)
        if method.ranking == "random":
            energy_N = random_scores(block, self._seed)
        # Shared experts are measured but have a bit width of their own (`shared_bits`).
        energies = [energy_N[span] for expert, span in expert_spans(block) if expert != SHARED]
        ranked = rank_blocks(energies, self._block_size, method.scope)
        levels = distribute_levels(ranked, method.levels(sum(block.widths)), block.num_experts)
        plans = []
        for expert, (energy_F, own) in enumerate(zip(energies, levels, strict=True)):
            order_F = energy_order(energy_F)
            plans.append(tied_plan(block.expert(expert), order_F, own, method.group, method.group))
        return plans

    def details(self) -> dict[str, object]:
        """Return the block size of the allocation."""
        return {"block": self._block_size}


class CameraQDagger(MixedBitQuantization):
    """Allocate bits over the input columns of gate, up and down, each matrix separately."""

    def check(self, structure: ModelStructure) -> None:
        """Also refuse a mean that these bits cannot produce in some matrix."""
        super().check(structure)
        blocks = self.blocks(structure)
        for size in {n for block in blocks for n in (block.d_model, *block.widths)}:
            self.levels(size)

    def planner(self, block: MoEBlock, alpha: float, seed: int) -> Planner:
        """Return the observer that measures the columns of a block's matrices."""
        return ColumnPlanner(self, block, alpha)


class ColumnPlanner(BlockEnergies):
    """Measures the inputs of every expert in addition to its micro-experts."""

    def __init__(self, method: CameraQDagger, block: MoEBlock, alpha: float) -> None:
        super().__init__(block)
        self._method, self._alpha = method, alpha
        device = block.expert(0).down.device
        self._inputs = [Moments(block.d_model, device) for _ in range(block.num_experts)]

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one routed expert."""
        super().routed(expert, x_SD, hidden_SF, weight_S)
        # Weight 1: gate and up see their inputs before the router weight is applied.
        self._inputs[expert].add(slice(None), x_SD, torch.ones_like(weight_S))

    def plans(self) -> list[ExpertPlan]:
        """Return a plan for every routed expert; down columns are sorted by energy."""
        energy_N = self.energies(self._alpha, normalised=self._method.normalised)
        spans = expert_spans(self.block)
        return [self._plan(expert, energy_N[span]) for expert, span in spans if expert != SHARED]

    def details(self) -> dict[str, object]:
        """Return nothing: the packed shapes contain the whole choice."""
        return {}

    def _plan(self, expert: int, energy_F: Tensor) -> ExpertPlan:
        view = self.block.expert(expert)
        order_F = energy_order(energy_F)
        # The columns of down are micro-experts and are reordered with them. The inputs of gate and
        # up come in the model's order, so these matrices store a permutation of their columns.
        down = MatrixPlan(self._shape(self.block.d_model, len(order_F), permuted=False))
        inputs = tuple(self._matrix(expert, weight_RD) for weight_RD in view.input_matrices())
        return ExpertPlan(order_F, inputs, down)

    def _matrix(self, expert: int, weight_RD: Tensor) -> MatrixPlan:
        norms_D = squared_column_norms(weight_RD)
        tokens = self.tokens if self._method.normalised else None
        energy_D = energy(self._inputs[expert], norms_D, self._alpha, tokens)
        shape = self._shape(*weight_RD.shape, permuted=True)
        return MatrixPlan(shape, energy_order(energy_D))

    def _shape(self, rows: int, columns: int, *, permuted: bool) -> PackedShape:
        levels = tuple(level for level in self._method.levels(columns) if level.size)
        return PackedShape(rows, columns, levels, "columns", self._method.group, permuted)
