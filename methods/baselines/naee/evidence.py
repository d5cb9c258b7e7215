"""What the error of a block without some experts is, from a few numbers a token.

Shapes: B rows, P tokens kept of each row, T = B·P tokens, E routed experts, D d_model.

With f_e(x) the output of expert e, A the router's weights, A^S those without the experts in S, and
δ = A - A^S, the block without S puts out y - Σ_e δ_e f_e(x). Against a target z, NAEE's error is

    Σ_rows √( Σ_t ‖ z_t - y_t + Σ_e δ_te f_e(x_t) ‖₂² )

(a Frobenius norm a calibration sample, summed over samples). So all that a token needs to keep is
‖z - y‖², the products f_e · (z - y) and f_e · f_e'; D is gone, and a set of experts costs E²
multiplications a token instead of a pass through the block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from bench.models.anatomy import MoEBlock
from methods.baselines.routing import dense, route
from methods.baselines.whole_experts import Form
from methods.walking import refuse_nan

# Tokens that all experts are run on at once.
CHUNK = 256


class Evidence:
    """The error of one block as a function of the experts that are gone."""

    @torch.no_grad()
    def __init__(
        self, block: MoEBlock, x_BPD: Tensor, y_BPD: Tensor, target_BPD: Tensor, form: Form
    ) -> None:
        self._block, self._form = block, form
        self._rows = len(x_BPD)
        x_TD = x_BPD.flatten(0, 1)
        missing_TD = (target_BPD - y_BPD).flatten(0, 1).double()
        self._logits_TE, weight_TK, index_TK = block.router(x_TD)
        self._weight_TE = dense(weight_TK, index_TK, block.num_experts).double()
        self._offset_T = missing_TD.square().sum(1)
        parts = [_products(block, *part) for part in _chunks(x_TD, missing_TD)]
        self._cross_TE = torch.cat([cross for cross, _ in parts])
        self._gram_TEE = torch.cat([gram for _, gram in parts])
        refuse_nan(block, self._offset_T, self._cross_TE, self._gram_TEE)

    @torch.no_grad()
    def error(self, dropped: Collection[int]) -> float:
        """Return NAEE's error of the block without some experts, computed in float64."""
        delta_TE = self._weight_TE - self._without(sorted(dropped))
        change_TE = (self._gram_TEE @ delta_TE[:, :, None]).squeeze(2) + 2 * self._cross_TE
        square_T = self._offset_T + (delta_TE * change_TE).sum(1)
        square_B = square_T.view(self._rows, -1).sum(1)
        # Rounding can leave a sum that should be zero a little below it.
        return float(square_B.clamp_min(0).sqrt().sum())

    def _without(self, dropped: list[int]) -> Tensor:
        """Return the router's weights [T, E] in a block without some experts."""
        if self._form != "dropped":
            weight_TE = self._weight_TE.clone()
            weight_TE[:, dropped] = 0
            return weight_TE
        gone = torch.tensor(dropped, dtype=torch.int64, device=self._logits_TE.device)
        weight_TK, index_TK = route(self._block.router, self._logits_TE, gone)
        return dense(weight_TK, index_TK, self._block.num_experts).double()


def _chunks(x_TD: Tensor, missing_TD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(x_TD.split(CHUNK), missing_TD.split(CHUNK), strict=True)


def _products(block: MoEBlock, x_TD: Tensor, missing_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Return f_e · (z - y) [T, E] and f_e · f_e' [T, E, E] of some tokens, float64."""
    views = (block.expert(expert) for expert in range(block.num_experts))
    outputs = [view.combine(view.hidden(x_TD)) for view in views]
    output_TED = torch.stack(outputs, dim=1).double()
    cross_TE = (output_TED @ missing_TD[:, :, None]).squeeze(2)
    return cross_TE, output_TED @ output_TED.mT
