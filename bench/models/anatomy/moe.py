"""A mixture-of-experts block: what is where in it, in one vocabulary for all architectures."""

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

    `experts` takes (x [T, D], top_k_index [T, K], top_k_weights [T, K]) and returns [T, D]; its
    weights are `fused` (all experts in 3-D parameters), or a `list` of modules or slimbench's own
    `ragged` form, whose widths may differ. `shared` runs on every token, times
    sigmoid(shared_gate(x)) where there is a `shared_gate`, and is None in a block without shared
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
        """The width of the widest routed expert; in a network as published, of every one."""
        return max(self.widths)

    @property
    def micro_experts(self) -> int:
        """How many micro-experts the block has, routed and shared."""
        return self.d_shared + sum(self.widths)

    @property
    def parameters(self) -> int:
        """How many weights the experts hold: 3·D for each micro-expert; no router, no gate."""
        return 3 * self.d_model * self.micro_experts

    def expert(self, index: int) -> ExpertView:
        """Return a routed expert; writing to it changes the network."""
        if self.layout == "fused":
            return fused_view(self.experts, index)
        if self.layout == "ragged":
            return cast(RaggedExperts, self.experts).view(index)
        return module_view(self.experts.get_submodule(str(index)))

    def shared_view(self) -> ExpertView | None:
        """Return all shared experts as one expert of width `d_shared`; None without any."""
        return None if self.shared is None else module_view(self.shared)
