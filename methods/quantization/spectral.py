"""Experts in a shared spectral basis with bits per direction, after BitsMoE (arXiv 2606.00079).

BitsMoE stores one basis per layer and projection that all experts share, and of every expert the
factor that belongs to it: W_e = A_e V for gate and up, W_e = U B_e for down. A direction (a row of
V, a column of U) has its own number of bits in every expert, or none at all. Its release
(zjiayu064/BitsMoE @ 8b2b52d) has the storage, the quantizer and its error per direction. The input
of the decomposition, the rank and the objective are not released. Those here are ours, so results
are not BitsMoE's.

Shapes: E experts, S tokens of one expert, D d_model, F an expert's width, K directions, k those
that an expert stores, N directions of all matrices (or of all experts), G groups of a direction's F
values, B choices of bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bench.errors import UserError
from bench.method import Context, InputSize, MethodWork, WeightForm
from bench.models.bitpacking.packed_modules import PackedLinear
from bench.models.bitpacking.packed_shape import Level, PackedShape
from bench.models.model import Model
from bench.models.structure.expert_view import activation_of
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import MoEBlock
from methods.moe.calibration import NullObserver
from methods.moe.pruning import require_equal_widths
from methods.moe.quantizer.bit_budget import choose_bits_of_directions
from methods.moe.quantizer.expert_plan import matrix_weights
from methods.moe.quantizer.grid import ALTERNATIONS, quantize_signed
from methods.moe.quantizer.method import BitChoices, MoEQuantization
from methods.moe.quantizer.observers import BlockHessians, BlockPacker, PackedBlock
from methods.moe.quantizer.rounding import ExpertHessians
from methods.quantization.spectral_experts import (
    INDEX_BITS,
    MATRIX_NAMES,
    VALUE_BITS,
    SpectralExperts,
    SpectralMatrix,
    direction_bits,
    factor_shape,
)


class BitsMoeStyle(MoEQuantization):
    """Store routed experts as factors of a shared basis, with bits by direction.

    `mean_bits` counts everything that is stored of a block's routed experts, per weight that they
    had: codes, scales, singular values, indices, and the bases in the model's dtype. `bits` are
    those that a direction can have; a direction that is not worth its bits is not stored. `group`
    is values of a direction that share a scale.
    """

    accepts: ClassVar[frozenset[WeightForm]] = frozenset({"plain"})

    bits: BitChoices = (8, 6, 4, 3, 2, 1)
    mean_bits: float = Field(default=2.5, gt=0, allow_inf_nan=False)

    @property
    def bit_widths(self) -> set[int]:
        """All bit widths outside the experts: these alone have a `grid` to choose."""
        return {self.attention_bits, self.shared_bits, self.dense_bits, self.head_bits}

    def check(self, structure: ModelStructure) -> None:
        """Refuse dense decoders, and experts of different widths."""
        if not structure.moe:
            raise UserError(
                f"bitsmoe_style shares a basis among experts, and {structure.architecture} has "
                "none: use gptq or camera_q"
            )
        super().check(structure)
        require_equal_widths(structure.moe, "bitsmoe_style")

    def blocks(self, structure: ModelStructure) -> tuple[MoEBlock, ...]:
        """Return the blocks with experts."""
        return structure.moe

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Return the walk, the Gram matrices, decompositions and grids of all experts.

        An eigendecomposition takes 9·n³ in float64, which counts twice (Golub and Van Loan, Matrix
        Computations, section 8.3).
        """
        walk = super().work(structure, inputs)
        outside = self.packed_shapes(structure, structure.moe, routed=False)
        flops = elements = 0.0
        for block in structure.moe:
            grams = block.d_model**2 + block.d_ff**2
            flops += 2 * inputs.tokens * block.top_k * grams
            flops += 2 * 9 * len(MATRIX_NAMES) * block.d_model**3
            fitted = sum(bits in (2, 3, 4) for bits in self.bits)
            elements += matrix_weights(block) * (10 * ALTERNATIONS * fitted + 10 * len(self.bits))
        steps = self.rounding_steps(outside) if self.rounding == "gptq" else ()
        return replace(walk, flops=walk.flops + flops, elements=elements, steps=steps)

    def planners(self, model: Model, context: Context) -> Callable[[MoEBlock], BlockPacker]:
        """Return the factory of observers that decompose a block's experts."""
        return partial(SpectralPlanner, self)


class SpectralPlanner(NullObserver):
    """Collects the Gram matrices of a block's experts, and packs the block."""

    def __init__(self, method: BitsMoeStyle, block: MoEBlock) -> None:
        self._method = method
        self._hessians = BlockHessians(block)
        self._details: dict[str, object] = {}

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one routed expert."""
        self._hessians.routed(expert, x_SD, hidden_SF, weight_S)

    def details(self) -> dict[str, object]:
        """Return the directions stored, by matrix, and how many of them have how many bits."""
        return self._details

    def pack(self, block: MoEBlock) -> PackedBlock:
        """Decompose the experts, choose bits, and return the module that replaces them."""
        self._hessians.require_finite()
        method, hessians = self._method, smoothed(self._hessians.experts, self._method.min_tokens)
        views = [block.expert(expert) for expert in range(block.num_experts)]
        dtype = views[0].down.dtype
        spectra = {
            name: input_spectrum([getattr(v, name) for v in views], hessians, method.damping)
            for name in ("gate", "up")
        }
        spectra["down"] = output_spectrum([view.down for view in views], hessians)
        choices = (0, *sorted(method.bits))
        loss_NEB = torch.cat([spectra[n].losses(choices, method.group) for n in MATRIX_NAMES])
        shared = block.d_model * dtype.itemsize * 8
        costs = [direction_bits(bits, block.d_ff, method.group) for bits in choices]
        budget = method.mean_bits * matrix_weights(block)
        choice_NE = choose_bits_of_directions(loss_NEB, costs, shared, budget)
        bits_NE = torch.tensor(choices, device=choice_NE.device)[choice_NE]
        parts = dict(zip(MATRIX_NAMES, bits_NE.chunk(len(MATRIX_NAMES)), strict=True))
        module = SpectralExperts(
            {
                name: packed_matrix(name, spectra[name], bits_KE, method.group, dtype)
                for name, bits_KE in parts.items()
            },
            activation_of(block.experts),
        )
        self._details = {
            "rank": {name: module.rank(name) for name in MATRIX_NAMES},
            "directions_by_bits": {
                str(bits): int((bits_NE == bits).sum()) for bits in choices if bits
            },
        }
        shapes = [linear.shape for linear in module.linears()]
        beside = sum(shape.rows * (VALUE_BITS + INDEX_BITS) for shape in shapes)
        beside += shared * sum(module.rank(name) for name in MATRIX_NAMES)
        return PackedBlock(module, shapes, beside)


def smoothed(experts: Sequence[ExpertHessians], tokens: int) -> list[ExpertHessians]:
    """Add `tokens` mean tokens to each expert's Gram matrices, float64.

    An expert that no token reached would otherwise be worth no bit.
    """
    count = max(1, sum(expert.inputs.tokens for expert in experts))
    mean_DD = sum(expert.inputs.total.double() for expert in experts) / count
    energy = sum(float(expert.hidden.total.trace()) for expert in experts) / count
    found = []
    for expert in experts:
        hidden_FF = expert.hidden.total.double()
        hidden_FF.diagonal().add_(tokens * energy / max(1, len(hidden_FF)))
        inputs = replace(expert.inputs, total=expert.inputs.total.double() + tokens * mean_DD)
        found.append(ExpertHessians(inputs, replace(expert.hidden, total=hidden_FF)))
    return found


@dataclass(frozen=True)
class Spectrum:
    """One matrix of all experts: rows of a basis [K, D], and each expert's factor [E, K, F].

    `energy_EK` is what the block's outputs of this matrix lose without a direction, and `noise_EK`
    what they lose for each unit of squared error of the direction's values; both are sums over the
    calibration tokens.
    """

    basis_KD: Tensor
    factor_EKF: Tensor
    energy_EK: Tensor
    noise_EK: Tensor

    def directions(self) -> tuple[Tensor, Tensor]:
        """Return the factors with directions of length 1, [E, K, F], and their lengths, [E, K].

        The lengths are the experts' singular values. Directions of length 0 stay 0.
        """
        norm_EK = torch.linalg.vector_norm(self.factor_EKF, dim=2)
        return self.factor_EKF / torch.where(norm_EK > 0, norm_EK, 1)[..., None], norm_EK

    def losses(self, choices: Sequence[int], group: int) -> Tensor:
        """Return the loss of every direction at every choice of bits, [K, E, B].

        It is relative to the energy of the matrix, so that gate, up and down weigh the same.
        """
        unit_EKF, norm_EK = self.directions()
        scale_EK = norm_EK.square() * self.noise_EK
        losses = []
        for bits in choices:
            if not bits:
                losses.append(self.energy_EK)
                continue
            rounded_EKF = rounded_directions(unit_EKF, bits, group)
            losses.append(scale_EK * (unit_EKF - rounded_EKF).square().sum(2))
        total = self.energy_EK.sum().clamp(min=torch.finfo(torch.float64).tiny)
        return torch.stack(losses, dim=-1).transpose(0, 1) / total


def input_spectrum(
    weights: Sequence[Tensor], hessians: Sequence[ExpertHessians], damping: float
) -> Spectrum:
    """Decompose gate or up matrices [F, D] with a basis of the input side.

    With the inputs' Gram matrix C = L Lᵀ over all experts, damped by a share of its mean diagonal,
    it is the singular value decomposition of the experts' rows times L: Σ_e W_eᵀ W_e in the metric
    of C. W_e = (W_e L Q) (Qᵀ L⁻¹).
    """
    total_DD = torch.stack([h.inputs.total for h in hessians]).sum(0)
    mean = float(total_DD.diagonal().mean()) or 1.0
    total_DD.diagonal().add_(damping * mean)
    lower_DD = torch.linalg.cholesky(total_DD)
    square_DD = sum((w.double().T @ w.double() for w in weights), torch.zeros_like(total_DD))
    _, vector_DK = torch.linalg.eigh(lower_DD.T @ square_DD @ lower_DD)
    vector_DK = vector_DK.flip(1)
    basis_KD = torch.linalg.solve_triangular(lower_DD.T, vector_DK, upper=True).T
    length_K = basis_KD.norm(dim=1)
    basis_KD = basis_KD / length_K[:, None]
    turn_DK = lower_DD @ vector_DK * length_K
    factor_EKF = torch.stack([(w.double() @ turn_DK).T for w in weights])
    noise_EK = torch.stack([(basis_KD @ h.inputs.total * basis_KD).sum(1) for h in hessians])
    return Spectrum(basis_KD, factor_EKF, factor_EKF.square().sum(2) * noise_EK, noise_EK)


def output_spectrum(weights: Sequence[Tensor], hessians: Sequence[ExpertHessians]) -> Spectrum:
    """Decompose down matrices [D, F] with a basis of the output side.

    Its directions are the eigenvectors of Σ_e W_e H_e W_eᵀ, the Gram matrix of the experts'
    outputs. W_e = U (Uᵀ W_e).
    """
    hidden_EFF = torch.stack([h.hidden.total for h in hessians])
    weight_EDF = torch.stack([w.double() for w in weights])
    output_DD = (weight_EDF @ hidden_EFF @ weight_EDF.mT).sum(0)
    _, basis_DK = torch.linalg.eigh(output_DD)
    basis_KD = basis_DK.flip(1).T
    factor_EKF = basis_KD @ weight_EDF
    energy_EK = (factor_EKF @ hidden_EFF * factor_EKF).sum(2)
    # Rounding errors are taken as independent of the hidden states' directions.
    trace_E = hidden_EFF.diagonal(dim1=1, dim2=2).mean(1)
    return Spectrum(basis_KD, factor_EKF, energy_EK, trace_E[:, None].expand_as(energy_EK))


def rounded_directions(unit_EKF: Tensor, bits: int, group: int) -> Tensor:
    """Return the values that the codes of directions stand for, [E, K, F], float64."""
    code_NF, scale_NG = quantize_signed(unit_EKF.flatten(0, 1).float(), bits, group)
    width_G = torch.tensor([part.shape[1] for part in code_NF.split(group, dim=1)])
    scale_NF = scale_NG.half().double().repeat_interleave(width_G.to(code_NF.device), dim=1)
    return (code_NF.double() * scale_NF).view_as(unit_EKF)


def packed_matrix(
    name: str, spectrum: Spectrum, bits_KE: Tensor, group: int, dtype: torch.dtype
) -> SpectralMatrix:
    """Pack the factors of every expert; rows of the basis that no expert uses are left out."""
    used_K = bits_KE.any(1)
    row_K = used_K.cumsum(0) - 1
    unit_EKF, norm_EK = spectrum.directions()
    factors, values, places = [], [], []
    for expert, bits_K in enumerate(bits_KE.T):
        # Stable: among equal bits, the strongest direction first.
        order_k = bits_K.argsort(descending=True, stable=True)[: int((bits_K > 0).sum())]
        bits_k = bits_K[order_k].tolist()
        levels = [Level(bits, len(list(run))) for bits, run in groupby(bits_k)]
        shape = factor_shape(name, levels, unit_EKF.shape[2], group)
        factors.append(_packed_factor(unit_EKF[expert][order_k].float(), shape, dtype))
        values.append(norm_EK[expert][order_k].half())
        places.append(row_K[order_k].to(torch.int16))
    if not all(bool(value_k.isfinite().all()) for value_k in values):
        raise UserError("cannot store singular values above 65504: the weights are not finite")
    return SpectralMatrix(spectrum.basis_KD[used_K].to(dtype), factors, values, places)


def _packed_factor(unit_kF: Tensor, shape: PackedShape, dtype: torch.dtype) -> PackedLinear:
    packed = PackedLinear(shape, dtype, device=unit_kF.device)
    codes = [unit_kF.new_zeros(0, shape.columns)]
    scales = [unit_kF.new_zeros(0, len(shape.groups()))]
    for block in shape.blocks():
        code_rF, scale_rG = quantize_signed(unit_kF[block.rows], block.bits, shape.group)
        # One bit is the code 0 or 1 of a grid about 0: half a step to either side.
        codes.append((code_rF + 1) / 2 if block.bits == 1 else code_rF + 2 ** (block.bits - 1))
        scales.append(2 * scale_rG if block.bits == 1 else scale_rG)
    scale_kG = torch.cat(scales).half()
    packed.store(torch.cat(codes).to(torch.uint8), scale_kG, torch.zeros_like(scale_kG))
    return packed
