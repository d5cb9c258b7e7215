"""Module of routed experts with a shared base and low-rank differences.

Shapes: T tokens, K experts per token, S tokens of one expert, D d_model, F an expert's width, O
outputs and I inputs of a matrix, R the ranks of all experts together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bench.models.replaced_modules import ModuleSpec, ReplacedModule
from bench.models.structure.expert_view import activation_of, slots_per_expert

MATRIX_NAMES = ("gate", "up", "down")


@dataclass(frozen=True)
class SharedMatrix:
    """One matrix of every expert: W_e = base + left_e right_e.

    The factors of all experts are concatenated in `left_OR` and `right_RI`; `ranks` holds the rank
    of each expert, which may be zero.
    """

    base_OI: Tensor
    left_OR: Tensor
    right_RI: Tensor
    ranks: Sequence[int]

    def base_part(self, x_TI: Tensor) -> Tensor:
        """Return the output of the base, [T, O], the same for every expert."""
        return linear(x_TI, self.base_OI)

    def expert_part(self, x_SI: Tensor, expert: int) -> Tensor:
        """Return the output of an expert's factors, [S, O]."""
        place = self._place(expert)
        return linear(linear(x_SI, self.right_RI[place]), self.left_OR[:, place])

    def weight(self, expert: int) -> Tensor:
        """Return an expert's matrix multiplied out, [O, I]; a copy."""
        place = self._place(expert)
        return self.base_OI + self.left_OR[:, place] @ self.right_RI[place]

    def _place(self, expert: int) -> slice:
        stops = list(accumulate(self.ranks))
        return slice(stops[expert] - self.ranks[expert], stops[expert])


class SharedBaseExperts(ReplacedModule):
    """Routed experts y = Σ_e A_e · Wdown_e (act(Wgate_e x) ⊙ Wup_e x) with shared base matrices.

    Each base matrix is applied once per token, not once per selected expert: the down base is
    applied to the weighted sum of the hidden states of its experts.
    """

    def __init__(
        self, matrices: Mapping[str, SharedMatrix], act_fn: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.act_fn = act_fn
        self.ranks = {name: tuple(matrices[name].ranks) for name in MATRIX_NAMES}
        self.num_experts = len(self.ranks["gate"])
        # Registered on this module itself, not on submodules: accelerate onloads the weights of a
        # module when its own forward is called, and no submodule's forward ever is.
        for name, matrix in matrices.items():
            tensors = {"base": matrix.base_OI, "left": matrix.left_OR, "right": matrix.right_RI}
            for part, tensor in tensors.items():
                weight = nn.Parameter(tensor.contiguous(), requires_grad=False)
                self.register_parameter(f"{name}_{part}", weight)

    def matrix(self, name: str) -> SharedMatrix:
        """Return the gate, up or down matrix of all experts; tensors are shared, not copied."""
        base, left, right = (getattr(self, f"{name}_{part}") for part in ("base", "left", "right"))
        return SharedMatrix(base, left, right, self.ranks[name])

    def routed_parameters(self) -> tuple[int, int]:
        """Return (parameters of all factors, E); the bases belong to no single expert."""
        matrices = [self.matrix(name) for name in MATRIX_NAMES]
        factors = sum(m.left_OR.numel() + m.right_RI.numel() for m in matrices)
        return factors, self.num_experts

    def spec(self) -> ModuleSpec:
        """Return the shapes and the ranks."""
        width, d_model = self.matrix("gate").base_OI.shape
        ranks = {name: list(each) for name, each in self.ranks.items()}
        return {"d_model": d_model, "width": width, "ranks": ranks}

    @classmethod
    def from_spec(cls, spec: ModuleSpec, original: nn.Module) -> Self:
        """Build with zeros, on the current default device and in the default dtype."""
        inner, outer = int(spec["width"]), int(spec["d_model"])
        shapes = {"gate": (inner, outer), "up": (inner, outer), "down": (outer, inner)}
        matrices = {}
        for name, (outputs, inputs) in shapes.items():
            ranks = [int(rank) for rank in spec["ranks"][name]]
            left_OR, right_RI = torch.zeros(outputs, sum(ranks)), torch.zeros(sum(ranks), inputs)
            matrices[name] = SharedMatrix(torch.zeros(outputs, inputs), left_OR, right_RI, ranks)
        return cls(matrices, activation_of(original))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, [T, D]."""
        x_TD, weight_S = hidden_states, top_k_weights.flatten()
        gate, up, down = (self.matrix(name) for name in MATRIX_NAMES)
        # Gate and up act on the token itself, so their base part is the same for all K experts.
        gate_TF, up_TF = gate.base_part(x_TD), up.base_part(x_TD)
        # float32 sums: up to K terms per token, which would each be rounded in half precision.
        sum_TF = torch.zeros_like(gate_TF, dtype=torch.float32)
        own_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for expert, slot_S in enumerate(slots_per_expert(top_k_index, self.num_experts)):
            if not len(slot_S):
                continue
            token_S = slot_S // top_k_index.shape[1]
            x_SD = x_TD[token_S]
            gate_SF = gate_TF[token_S] + gate.expert_part(x_SD, expert)
            up_SF = up_TF[token_S] + up.expert_part(x_SD, expert)
            # The router weight is applied before the down projection, which is linear: only then
            # can hidden states of different experts be summed for one product with the down base.
            hidden_SF = self.act_fn(gate_SF) * up_SF * weight_S[slot_S, None]
            hidden_SF = hidden_SF.to(x_TD.dtype)
            sum_TF.index_add_(0, token_S, hidden_SF.float())
            own_TD.index_add_(0, token_S, down.expert_part(hidden_SF, expert).float())
        return down.base_part(sum_TF.to(x_TD.dtype)) + own_TD.to(x_TD.dtype)
