"""Squared activations of every micro-expert of a MoE block on calibration text.

Shapes: N micro-experts of a layer (shared ones first), S tokens of one expert, T tokens, D d_model,
F an expert's width.
"""

from __future__ import annotations

from torch import Tensor

from bench.models.anatomy import MoEBlock
from methods.camera.energy import Moments
from methods.micro_experts import SHARED, spans, view


class Activations:
    """Observer that sums φ² over tokens per micro-expert, φ including the router weight."""

    def __init__(self, block: MoEBlock) -> None:
        self._places = dict(spans(block))
        # On the device of the first routed expert: no decoder layer is split over devices, so the
        # sums live where their terms are computed.
        self._moments = Moments(block.micro_experts, view(block, 0).down.device)

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one routed expert."""
        self._moments.add(self._places[expert], hidden_SF, weight_S)

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """Add all tokens of the shared experts."""
        self._moments.add(self._places[SHARED], hidden_TF, weight_T)

    def output(self, y_TD: Tensor) -> None:
        """Ignore the block output."""

    def square_sum(self) -> Tensor:
        """Return Σ_t φ², float64 [N]."""
        return self._moments.square_sum_N
