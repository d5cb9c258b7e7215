"""Routed experts with packed weights, each with its own width.

Shapes: T tokens, K experts per token, S tokens of one expert, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from bench.models.packed.linear import PackedLinear


class PackedExpert(nn.Module):
    """One gated expert y = Wdown (act(Wgate x) ⊙ Wup x); its width may be zero."""

    def __init__(
        self,
        gate: PackedLinear,
        up: PackedLinear,
        down: PackedLinear,
        act: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.act_fn = act

    def forward(self, x_SD: Tensor) -> Tensor:
        """Compute the expert's output, [S, D]; one matrix at a time is dequantized."""
        hidden_SF = self.act_fn(self.gate_proj(x_SD)) * self.up_proj(x_SD)
        return cast(Tensor, self.down_proj(hidden_SF))


class PackedExperts(nn.ModuleList):
    """The experts of one MoE block, with the call of transformers' fused experts."""

    def __init__(self, experts: Iterable[PackedExpert]) -> None:
        super().__init__(experts)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute Σ_e A_e · expert_e(x), [T, D], for x [T, D] and the router's choice [T, K]."""
        x_TD, top_k = hidden_states, top_k_index.shape[1]
        # Summed in float32, so that the order of the experts does not show in half precision.
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for expert, slots_S in self._assignments(top_k_index):
            token_S = slots_S // top_k
            weight_S = top_k_weights.flatten()[slots_S]
            y_SD = self[expert](x_TD[token_S]) * weight_S[:, None]
            y_TD.index_add_(0, token_S, y_SD.float())
        return y_TD.to(x_TD.dtype)

    def _assignments(self, index_TK: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield each expert that has tokens, with its slots in the flattened choice."""
        flat = index_TK.flatten()
        if flat.is_meta:
            # On meta the choice has no values and only FLOPs are counted: tokens are distributed
            # evenly. Real routing is uneven, but the FLOPs of equally wide experts add up to the
            # same.
            bounds = [flat.numel() * place // len(self) for place in range(len(self) + 1)]
            counts = [stop - start for start, stop in pairwise(bounds)]
            order = torch.arange(flat.numel(), device=flat.device)
        else:
            # Stable, so that the order of tokens within an expert is the same on every device.
            order = torch.argsort(flat, stable=True)
            counts = torch.bincount(flat, minlength=len(self)).tolist()
        for expert, slots_S in enumerate(torch.split(order, counts)):
            if len(slots_S):
                yield expert, slots_S
