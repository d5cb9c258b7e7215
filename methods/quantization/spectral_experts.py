"""Routed experts as quantized factors of bases that they share: how they are stored and computed.

Shapes: E experts, T tokens, S tokens of one expert, D d_model, F an expert's width, K directions of
a basis, k those that an expert stores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bench.models.bitpacking.packed_modules import PackedLinear
from bench.models.bitpacking.packed_shape import Level, PackedShape
from bench.models.replaced_modules import ModuleSpec, ReplacedModule
from bench.models.structure.expert_view import Activation, activation_of, slots_per_expert

MATRIX_NAMES = ("gate", "up", "down")
VALUE_BITS, INDEX_BITS, SCALE_BITS = 16, 16, 16
"""Bits of a stored singular value, of a direction's row of the basis, and of a scale."""


def direction_bits(bits: int, width: int, group: int) -> int:
    """Return the bits that a direction takes in one expert: codes, scales, value and index."""
    if not bits:
        return 0
    return width * bits + -(-width // group) * SCALE_BITS + VALUE_BITS + INDEX_BITS


@dataclass(frozen=True)
class SpectralMatrix:
    """One packed matrix of all experts: the basis [K, D], and by expert its factor [k, F].

    `values` are singular values [k] and `places` the rows of the basis [k], most bits first.
    """

    basis_KD: Tensor
    factors: Sequence[PackedLinear]
    values: Sequence[Tensor]
    places: Sequence[Tensor]


def factor_shape(name: str, levels: Sequence[Level], width: int, group: int) -> PackedShape:
    """Return how an expert's factor [k, F] is packed; those of gate and up lead to its F values."""
    rows = sum(level.size for level in levels)
    enters = name != "down"
    return PackedShape(rows, width, tuple(levels), group=group, grid="symmetric", transposed=enters)


class SpectralExpert(nn.Module):
    """One expert, from coefficients in the bases of gate and up to those in the basis of down."""

    def __init__(self, matrices: Mapping[str, SpectralMatrix], expert: int) -> None:
        super().__init__()
        for name in MATRIX_NAMES:
            self.add_module(name, matrices[name].factors[expert])
            self.register_buffer(f"{name}_value", matrices[name].values[expert])
            self.register_buffer(f"{name}_place", matrices[name].places[expert])

    def forward(self, gate_SK: Tensor, up_SK: Tensor, rank: int, act: Activation) -> Tensor:
        """Return the output's coefficients, [S, rank]."""
        hidden_SF = act(self._enter("gate", gate_SK)) * self._enter("up", up_SK)
        value_k, place_k = self._directions("down", hidden_SF)
        output_SK = hidden_SF.new_zeros(len(hidden_SF), rank)
        return output_SK.index_add(1, place_k, self.get_submodule("down")(hidden_SF) * value_k)

    def _enter(self, name: str, x_SK: Tensor) -> Tensor:
        value_k, place_k = self._directions(name, x_SK)
        return cast(Tensor, self.get_submodule(name)(x_SK[:, place_k] * value_k))

    def _directions(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        value_k, place_k = getattr(self, f"{name}_value"), getattr(self, f"{name}_place")
        return value_k.to(like.dtype), place_k.long()


class SpectralExperts(ReplacedModule):
    """Routed experts y = Σ_e A_e · Wdown_e (act(Wgate_e x) ⊙ Wup_e x) as factors of shared bases.

    Each basis is applied once per token, not once per chosen expert.
    """

    def __init__(self, matrices: Mapping[str, SpectralMatrix], act_fn: Activation) -> None:
        super().__init__()
        self.act_fn = act_fn
        self.num_experts = len(matrices["gate"].factors)
        for name in MATRIX_NAMES:
            basis_KD = nn.Parameter(matrices[name].basis_KD.contiguous(), requires_grad=False)
            self.register_parameter(f"{name}_basis", basis_KD)
        self.factors = nn.ModuleList(
            SpectralExpert(matrices, expert) for expert in range(self.num_experts)
        )

    def rank(self, name: str) -> int:
        """Return the number of directions in the basis of gate, up or down."""
        return len(self.basis(name))

    def basis(self, name: str) -> Tensor:
        """Return the basis of gate, up or down, [K, D]."""
        # Not `get_parameter`: where FLOPs are counted, other tensors stand for the parameters.
        return cast(Tensor, getattr(self, f"{name}_basis"))

    def linears(self) -> list[PackedLinear]:
        """Return the factors of all experts."""
        return [part for part in self.modules() if isinstance(part, PackedLinear)]

    def routed_parameters(self) -> tuple[int, int]:
        """Return (weights of all factors, E); the bases belong to no single expert."""
        return sum(part.numel for part in self.linears()), self.num_experts

    def spec(self) -> ModuleSpec:
        """Return ranks, widths, and the bits of every expert's directions."""
        (first, *_) = self.linears()
        return {
            "d_model": self.basis("gate").shape[1],
            "width": first.shape.columns,
            "group": first.shape.group,
            "rank": {name: self.rank(name) for name in MATRIX_NAMES},
            "levels": {
                name: [
                    [
                        list(level)
                        for level in cast(PackedLinear, part.get_submodule(name)).shape.levels
                    ]
                    for part in self.factors
                ]
                for name in MATRIX_NAMES
            },
        }

    @classmethod
    def from_spec(cls, spec: ModuleSpec, original: nn.Module) -> Self:
        """Build with zeros, on the current default device and in the default dtype."""
        matrices = {}
        for name in MATRIX_NAMES:
            basis_KD = torch.zeros(int(spec["rank"][name]), int(spec["d_model"]))
            shapes = [
                factor_shape(
                    name,
                    [Level(*level) for level in levels],
                    int(spec["width"]),
                    int(spec["group"]),
                )
                for levels in spec["levels"][name]
            ]
            factors = [PackedLinear(shape, basis_KD.dtype) for shape in shapes]
            values = [torch.zeros(shape.rows, dtype=torch.float16) for shape in shapes]
            places = [torch.zeros(shape.rows, dtype=torch.int16) for shape in shapes]
            matrices[name] = SpectralMatrix(basis_KD, factors, values, places)
        return cls(matrices, activation_of(original))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, [T, D]."""
        x_TD, weight_S = hidden_states, top_k_weights.flatten()
        gate_TK, up_TK = linear(x_TD, self.basis("gate")), linear(x_TD, self.basis("up"))
        rank = self.rank("down")
        # Summed in float32, so that the order of the experts does not show in half precision.
        sum_TK = x_TD.new_zeros(len(x_TD), rank, dtype=torch.float32)
        for expert, slot_S in enumerate(slots_per_expert(top_k_index, self.num_experts)):
            if not len(slot_S):
                continue
            token_S = slot_S // top_k_index.shape[1]
            own_SK = self.factors[expert](gate_TK[token_S], up_TK[token_S], rank, self.act_fn)
            sum_TK.index_add_(0, token_S, (own_SK * weight_S[slot_S, None]).float())
        return sum_TK.to(x_TD.dtype) @ self.basis("down")
