"""Mixture-of-experts block in one vocabulary for all architectures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from torch import nn

from bench.models.anatomy.expert import ExpertView, fused_view, module_view
from bench.models.anatomy.ragged import RaggedExperts

Layout = Literal["fused", "list", "ragged"]


@dataclass(frozen=True)
class MoEBlock:
    """One MoE block of a decoder layer.

    `experts` takes (x [T, D], top_k_index [T, K], top_k_weights [T, K]) and returns [T, D]. Its
    weights are `fused` (all experts in 3-D parameters), a `list` of modules, or slimbench's own
    `ragged` form; widths may differ in the last two. `shared` runs on every token, multiplied by
    sigmoid(shared_gate(x)) if there is a `shared_gate`; it is None in a block without shared
    experts.
    """

    layer: int
    name: str
    block: nn.Module
    experts: nn.Module
    router: nn.Module
    shared: nn.Module | None
    shared_gate: nn.Module | None
    layout: Layout
    num_experts: int
    top_k: int
    d_model: int
    widths: tuple[int, ...]
    d_shared: int

    @property
    def d_ff(self) -> int:
        """Width of the widest routed expert; in a published network, of every routed expert."""
        return max(self.widths)

    @property
    def micro_experts(self) -> int:
        """Number of micro-experts in the block, routed and shared."""
        return self.d_shared + sum(self.widths)

    @property
    def parameters(self) -> int:
        """Number of weights in the experts: 3·D per micro-expert, without router and gate."""
        return 3 * self.d_model * self.micro_experts

    def expert(self, index: int) -> ExpertView:
        """View a routed expert; writing to it changes the network."""
        if self.layout == "fused":
            return fused_view(self.experts, index)
        if self.layout == "ragged":
            return cast(RaggedExperts, self.experts).view(index)
        return module_view(self.experts.get_submodule(str(index)))

    def shared_view(self) -> ExpertView | None:
        """View all shared experts as one expert of width `d_shared`, or return None without any."""
        # Published blocks with several shared experts store them concatenated, as one wide expert.
        return None if self.shared is None else module_view(self.shared)
