"""CAMERA-Q (arXiv 2508.02322): more bits for micro-experts of more energy, packed.

There is no official code for it. What is known: micro-experts are sorted by energy and cut into
groups of falling bits, such as 3, 2 and 1; the up row, gate row and down column of a micro-expert
get the same bits; the quantizer is GPTQ at least in part.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from bench.models.anatomy import Anatomy, MoEBlock
from methods.camera.analysis import BlockEnergies
from methods.camera.bits import Scope, block_size, by_energy, share_out, units
from methods.camera.quant_levels import MixedBits
from methods.micro_experts import SHARED, spans
from methods.quantization.observers import Planner
from methods.quantization.plan import ExpertPlan, tied


class CameraQ(MixedBits):
    """Allocate bits by energy within a layer, the same for all weights of a micro-expert.

    `scope` ranks the routed micro-experts of a whole `layer`, as CAMERA-P does, or gives every
    `expert` the same shares. `block` is the number of micro-experts of an expert that change their
    bits together: by default one group, or an eighth of the narrowest expert if that is less.
    """

    scope: Scope = "layer"
    block: int | None = Field(default=None, ge=1)

    def check(self, anatomy: Anatomy) -> None:
        """Also refuse a mean that these bits cannot produce in some layer."""
        super().check(anatomy)
        for block in anatomy.moe:
            # Raises if no division exists: better now than after calibration.
            self.levels(sum(block.widths))

    def planner(self, block: MoEBlock) -> Planner:
        """Return the observer that measures the energies of a block and allocates bits by them."""
        return EnergyPlanner(self, block)


class EnergyPlanner(BlockEnergies):
    """Measures the energies of one block and plans the bits of its experts."""

    def __init__(self, method: CameraQ, block: MoEBlock) -> None:
        super().__init__(block)
        self._method = method
        self._block_size = method.block or block_size(block.widths, method.group)

    def plans(self) -> list[ExpertPlan]:
        """Return a plan for every routed expert: falling energy, falling bits."""
        method, block = self._method, self.block
        energy_N = self.energies(method.peak, normalised=method.normalised)
        # Shared experts are measured but have a bit width of their own (`shared_bits`).
        energies = [energy_N[place] for expert, place in spans(block) if expert != SHARED]
        ranked = units(energies, self._block_size, method.scope)
        dealt = share_out(ranked, method.levels(sum(block.widths)), block.num_experts)
        return [
            tied(by_energy(energy_F), levels, block.d_model, method.group, method.group)
            for energy_F, levels in zip(energies, dealt, strict=True)
        ]

    def details(self) -> dict[str, Any]:
        """Return the block size of the allocation."""
        return {"block": self._block_size}
