"""Energies of all micro-experts, measured on calibration text.

One walk over the decoder: a layer runs once with its experts observed, and once more if it was
changed, so that later layers are measured on the outputs of the changed ones (the order of the
official code). Shapes: B rows, L tokens per row, T tokens, S tokens of one expert, D d_model, F an
expert's width, N micro-experts of a layer, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.models.expert_hooks import ExpertObserver, observe_experts
from bench.models.model import Model
from bench.models.structure.moe_block import MoEBlock
from bench.ui import Progress
from methods.camera.energy import energy
from methods.moe.calibration_statistics import Moments, squared_column_norms
from methods.moe.calibration_walk import require_finite, walk_blocks
from methods.moe.micro_experts import SHARED, expert_spans, expert_view


@dataclass(frozen=True)
class WalkOptions:
    """Options of a calibration walk: `batch` rows and `chunk` tokens at a time.

    With `sequential` a layer that was changed runs again before the next one is measured.
    """

    batch: int
    chunk: int
    sequential: bool


class BlockEnergies:
    """Observer of one block that accumulates the statistics for its micro-experts' energies.

    `tokens` counts all tokens, `visits` [E] those of each routed expert; `output_power` is Σ_t
    ‖y_t‖² of the block output. A second observer, `beside`, receives everything that this one does.
    """

    def __init__(self, block: MoEBlock, beside: ExpertObserver | None = None) -> None:
        device = expert_view(block, 0).down.device
        self.block = block
        # A second observer instead of a second pass: the walk is the expensive part.
        self.beside = beside
        self.tokens = 0
        self.visits = [0] * block.num_experts
        self.output_power = 0.0
        self._places = dict(expert_spans(block))
        self._moments = Moments(block.micro_experts, device)

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one routed expert."""
        self.visits[expert] += len(x_SD)
        self._moments.add(self._places[expert], hidden_SF, weight_S)
        if self.beside is not None:
            self.beside.routed(expert, x_SD, hidden_SF, weight_S)

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """Add all tokens of the shared experts."""
        self._moments.add(self._places[SHARED], hidden_TF, weight_T)
        if self.beside is not None:
            self.beside.shared(x_TD, hidden_TF, weight_T)

    def output(self, y_TD: Tensor) -> None:
        """Add the power of the block output."""
        self.tokens += len(y_TD)
        self.output_power += float(y_TD.float().square().sum(dtype=torch.float64))
        if self.beside is not None:
            self.beside.output(y_TD)

    def energies(self, alpha: float, *, normalised: bool) -> Tensor:
        """Return the energies in flat order, float64 [N], using the current weights.

        Raises:
            UserError: an activation was NaN or infinite.
        """
        # `_places` is in flat order, so concatenated norms line up with the moments.
        norms = [
            squared_column_norms(expert_view(self.block, expert).down) for expert in self._places
        ]
        tokens = self.tokens if normalised else None
        energy_N = energy(self._moments, torch.cat(norms), alpha, tokens)
        require_finite(self.block, energy_N)
        return energy_N


def block_energies(
    model: Model,
    tokens_BL: Tensor,
    how: WalkOptions,
    progress: Progress,
    observer: Callable[[MoEBlock], BlockEnergies] = BlockEnergies,
) -> Iterator[BlockEnergies]:
    """Yield the measurements of every MoE block in layer order.

    The caller may modify a block before it requests the next one; with `how.sequential` later
    blocks then see the change.
    """

    def watching(seen: dict[MoEBlock, BlockEnergies]) -> AbstractContextManager[None]:
        return observe_experts(seen, how.chunk)

    for _, found in walk_blocks(
        model, tokens_BL, observer, watching, how.batch, how.sequential, progress
    ):
        yield found
