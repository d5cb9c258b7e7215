"""Output error of a block without some experts, from a few statistics per token.

Shapes: B rows, P tokens kept of each row, T = B·P tokens, E routed experts, D d_model.

With f_e(x) the output of expert e, A the router weights, A^S those without the experts in S, and δ
= A - A^S, the block without S outputs y - Σ_e δ_e f_e(x). Against a target z, NAEE's error is

    Σ_rows √( Σ_t ‖ z_t - y_t + Σ_e δ_te f_e(x_t) ‖₂² )

(one Frobenius norm per calibration sample, summed over samples). So a token only needs ‖z - y‖²,
the products f_e · (z - y) and the products f_e · f_e'. D drops out, and evaluating a set of experts
costs E² multiplications per token instead of a forward pass of the block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from bench.models.anatomy import MoEBlock
from methods.baselines.routing import dense, route
from methods.baselines.whole_experts import Form
from methods.walking import refuse_nan

# Tokens per chunk: all experts run on a chunk at once, [CHUNK, E, D] outputs in float64.
CHUNK = 256


class Evidence:
    """Error of one block as a function of the set of removed experts."""

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
        # ‖m + Σ δ f‖² = ‖m‖² + δ·(2 f·m + (f·f') δ) with m = z - y.
        change_TE = (self._gram_TEE @ delta_TE[:, :, None]).squeeze(2) + 2 * self._cross_TE
        square_T = self._offset_T + (delta_TE * change_TE).sum(1)
        square_B = square_T.view(self._rows, -1).sum(1)
        # Rounding can leave a sum that should be zero slightly negative.
        return float(square_B.clamp_min(0).sqrt().sum())

    def _without(self, dropped: list[int]) -> Tensor:
        """Return the router weights [T, E] of the block without some experts."""
        # Zeroed experts keep their tokens: nothing is rerouted, their term is just missing.
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
    # All experts on all tokens, not only on those routed to them: after a drop a token may reach
    # any expert.
    outputs = [view.combine(view.hidden(x_TD)) for view in views]
    output_TED = torch.stack(outputs, dim=1).double()
    cross_TE = (output_TED @ missing_TD[:, :, None]).squeeze(2)
    return cross_TE, output_TED @ output_TED.mT
