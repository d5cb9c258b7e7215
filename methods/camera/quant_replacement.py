"""Error in a layer's output when a micro-expert is rounded or removed.

Shapes: S tokens of one expert, F its width, N routed micro-experts of a layer, D d_model, O bit
options, I blocks of micro-experts, n micro-experts of one block.

A micro-expert adds φ_t w to the output of token t. Rounded to b bits it adds φ̂_t ŵ; replacing it
alone causes, summed over tokens, the squared error

    e(b) = Σ_t ‖φ_t w - φ̂_t ŵ‖² = ‖φ‖²‖w‖² - 2 ⟨φ, φ̂⟩⟨w, ŵ⟩ + ‖φ̂‖²‖ŵ‖²

At 0 bits that is ‖φ‖²‖w‖², CAMERA's energy at α = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bench.models.anatomy import ExpertView, MoEBlock
from bench.models.packed.shape import GRID_BITS
from methods.camera.bits import by_energy, cut
from methods.camera.energy import column_norms
from methods.quantization.grid import Clip
from methods.quantization.observers import Blind
from methods.quantization.rtn import rounded
from methods.walking import refuse_nan


@dataclass(frozen=True)
class Options:
    """Bit options, group sizes of inputs (`group`) and of down columns (`block`), clipping."""

    bits: tuple[int, ...]
    group: int
    block: int
    clip: Clip

    def costs(self, block: MoEBlock) -> Tensor:
        """Return the bits that every block of micro-experts takes, grids included, int64 [I, O].

        Each of n micro-experts has two rows (gate, up) with a grid per group of inputs; the down
        matrix has a grid per row for the columns of the block.
        """
        sizes = [n for width in block.widths for n in cut(width, self.block)]
        size_I1 = torch.tensor(sizes, dtype=torch.int64)[:, None]
        # -(-a // b) is the ceiling. Dropped blocks (0 bits) store no grid.
        grids_I1 = 2 * size_I1 * -(-block.d_model // self.group) + block.d_model
        bits_O = torch.tensor(self.bits)
        return 3 * block.d_model * size_I1 * bits_O + GRID_BITS * grids_I1 * (bits_O > 0)


class Overlaps:
    """‖φ‖², and for every bit option ⟨φ, φ̂⟩ and ‖φ̂‖², of one expert's micro-experts."""

    def __init__(self, width: int, options: int, device: torch.device) -> None:
        self.square_F = torch.zeros(width, dtype=torch.float64, device=device)
        self.cross_OF = torch.zeros(options, width, dtype=torch.float64, device=device)
        self.rounded_OF = torch.zeros_like(self.cross_OF)


class Replacement(Blind):
    """Measures the errors e(b) of a layer's routed micro-experts."""

    def __init__(self, block: MoEBlock, options: Options) -> None:
        self.block, self.options = block, options
        device = block.expert(0).down.device
        self._overlaps = [Overlaps(width, len(options.bits), device) for width in block.widths]

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one routed expert, recomputed for every bit option."""
        view, seen = self.block.expert(expert), self._overlaps[expert]
        weight_S1 = weight_S.float()[:, None]
        phi_SF = hidden_SF.float() * weight_S1
        seen.square_F += phi_SF.square().sum(0, dtype=torch.float64)
        for option, bits in enumerate(self.options.bits):
            if bits:
                # Gate and up rounded, down not: φ̂ is the coefficient only. The rounding of the
                # down column enters through ⟨w, ŵ⟩ and ‖ŵ‖², which need no tokens.
                hat_SF = self._rounded(view, bits).hidden(x_SD.float()) * weight_S1
                seen.cross_OF[option] += (phi_SF * hat_SF).sum(0, dtype=torch.float64)
                seen.rounded_OF[option] += hat_SF.square().sum(0, dtype=torch.float64)

    @cached_property
    def blocks(self) -> list[tuple[Tensor, ...]]:
        """Per expert, its micro-experts' indices by falling energy, split into blocks."""
        found = []
        for expert, seen in enumerate(self._overlaps):
            order_F = by_energy(seen.square_F * column_norms(self.block.expert(expert).down))
            sizes = cut(len(order_F), self.options.block)
            found.append(torch.split(order_F, sizes) if sizes else ())
        return found

    @cached_property
    def losses(self) -> Tensor:
        """The summed error of every block at every bit option, float64 [I, O] on the CPU."""
        rows = [
            self._losses(expert, chosen_n)
            for expert, parts in enumerate(self.blocks)
            for chosen_n in parts
        ]
        loss_IO = torch.stack(rows).cpu()
        refuse_nan(self.block, loss_IO)
        return loss_IO

    @cached_property
    def energy(self) -> float:
        """The summed error of removing each micro-expert alone."""
        return sum(
            float((seen.square_F * column_norms(self.block.expert(expert).down)).sum())
            for expert, seen in enumerate(self._overlaps)
        )

    def settled(self) -> Replacement:
        """Compute everything that needs the block's weights, and return self."""
        # Cached properties: reading them stores their values.
        _ = self.blocks, self.losses, self.energy
        return self

    def _losses(self, expert: int, chosen_n: Tensor) -> Tensor:
        """Return the errors of one block, float64 [O]."""
        seen, group = self._overlaps[expert], self.options.block
        down_Dn = self.block.expert(expert).down[:, chosen_n].float()
        energy_n = seen.square_F[chosen_n] * column_norms(down_Dn)
        losses = []
        for option, bits in enumerate(self.options.bits):
            loss_n = energy_n
            if bits:
                # Rounded as one group, since the block is one group of the stored down matrix: the
                # error depends on which micro-experts share the grid.
                hat_Dn = rounded(down_Dn, bits, group, self.options.clip)
                inner_n = (down_Dn * hat_Dn).sum(0, dtype=torch.float64)
                cross_n = seen.cross_OF[option, chosen_n] * inner_n
                square_n = seen.rounded_OF[option, chosen_n] * column_norms(hat_Dn)
                loss_n = energy_n - 2 * cross_n + square_n
            losses.append(loss_n.sum())
        return torch.stack(losses)

    def _rounded(self, view: ExpertView, bits: int) -> ExpertView:
        group, clip = self.options.group, self.options.clip
        gate, up = (rounded(weight, bits, group, clip) for weight in (view.gate, view.up))
        return ExpertView(gate, up, view.down, view.act)
