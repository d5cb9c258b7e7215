"""NAEE's error of a block after removing some experts, from a few statistics per token.

Shapes: B rows, T tokens, E routed experts, K experts per token, D d_model, S subsets of experts, C
sets of K experts.

Let f_e(x) be the output of expert e, A the router weights, A^S those without the experts in S, and
δ = A - A^S. Then the block without S outputs y - Σ_e δ_e f_e(x). For a target z, NAEE's error is

    Σ_rows √( Σ_t ‖ z_t - y_t + Σ_e δ_te f_e(x_t) ‖₂² )

(one Frobenius norm per calibration sample, summed over samples). So for each token only ‖z - y‖²
and the products f_e · (z - y) and f_e · f_e' are needed. D drops out, and evaluating a set of
experts takes E² multiplications per token instead of a forward of the block. Many sets are
evaluated together, with one call of the router and one product.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor

from bench.models.structure.moe_block import MoEBlock
from methods.baselines.expert_removal import ExpertState
from methods.baselines.router_masks import (
    call_router,
    dense_routing_weights,
    given_by,
    parts_of,
    require_known_rule,
    route,
)
from methods.moe.calibration import require_finite

# Tokens per chunk: all experts run on a chunk together, [CHUNK, E, D] outputs in float64.
EXPERT_CHUNK = 256
# Values in the largest tensor of a batch of subsets, the router's input: 4 MB in float32. Larger
# tensors are allocated anew each time, which takes longer than the arithmetic.
SUBSET_VALUES = 2**20
# Values in the largest table of choices: 256 MB in float64.
TABLE_VALUES = 2**25
# Number of subsets for which the table of choices is compared with the router's rule.
SAMPLE = 8


class BlockErrorModel:
    """Error of one block as a function of the set of removed experts."""

    @torch.no_grad()
    def __init__(
        self, block: MoEBlock, x_BPD: Tensor, y_BPD: Tensor, target_BPD: Tensor, state: ExpertState
    ) -> None:
        if state == "dropped":
            require_known_rule(block)
        self._block, self._state = block, state
        self._rows = len(x_BPD)
        x_TD = x_BPD.flatten(0, 1)
        missing_TD = (target_BPD - y_BPD).flatten(0, 1).double()
        self._logits_TE, weight_TK, index_TK = call_router(block, x_TD)
        self._weight_TE = dense_routing_weights(weight_TK, index_TK, block.num_experts).double()
        self._offset_T = missing_TD.square().sum(1)
        parts = [_inner_products(block, *part) for part in _chunks(x_TD, missing_TD)]
        self._cross_TE = torch.cat([cross for cross, _ in parts])
        self._gram_TEE = torch.cat([gram for _, gram in parts])
        require_finite(block, self._offset_T, self._cross_TE, self._gram_TEE)

    def error(self, dropped: Collection[int]) -> float:
        """Return NAEE's error of the block without some experts, computed in float64."""
        return self.errors([tuple(dropped)])[0]

    @torch.no_grad()
    def errors(self, subsets: Sequence[Collection[int]]) -> list[float]:
        """Return the error for each of several sets of removed experts."""
        if not subsets:
            return []
        gone_SE = torch.zeros(
            len(subsets), self._block.num_experts, dtype=torch.bool, device=self._offset_T.device
        )
        for place, dropped in enumerate(subsets):
            gone_SE[place, list(dropped)] = True
        values = len(self._offset_T) * max(self._block.d_model, self._block.num_experts)
        parts = gone_SE.split(max(1, SUBSET_VALUES // values))
        choices = self._choices(gone_SE)
        if choices is None:
            return torch.cat([self._batch(part_SE) for part_SE in parts]).tolist()
        # A lookup does not depend on the model's width.
        parts = gone_SE.split(max(1, SUBSET_VALUES // (8 * len(self._offset_T))))
        return torch.cat([self._sum(choices.squares(part_SE)) for part_SE in parts]).tolist()

    def _choices(self, gone_SE: Tensor) -> ChoiceErrors | None:
        """Return the errors for all sets of K experts, None unless they are fewer than the subsets.

        Also return None if a subset's error is not that of the K experts which remain for a token.
        """
        block, tokens = self._block, len(self._offset_T)
        choices = math.comb(block.num_experts, block.top_k)
        few = choices < len(gone_SE) and choices * tokens <= TABLE_VALUES
        if self._state != "dropped" or not few or self._own_bias():
            return None
        every = combinations(range(block.num_experts), block.top_k)
        kept_CE = torch.zeros(choices, block.num_experts, dtype=torch.bool)
        kept_CE.scatter_(1, torch.tensor(list(every)), True)
        values = tokens * max(block.d_model, block.num_experts)
        parts = kept_CE.to(gone_SE.device).split(max(1, SUBSET_VALUES // values))
        square_CT = torch.cat([self._squares(~part_CE) for part_CE in parts])
        order_TE = self._logits_TE.argsort(dim=1, descending=True)
        found = ChoiceErrors(kept_CE.to(gone_SE.device), square_CT, order_TE)
        # Weights may depend on experts that are not selected (a softmax over all remaining ones),
        # and the order of selection may differ from that of the logits. This check detects both.
        sample_SE = gone_SE[:: max(1, len(gone_SE) // SAMPLE)]
        wanted_ST, got_ST = self._squares(sample_SE), found.squares(sample_SE)
        # Routers compute in float32.
        close = torch.allclose(got_ST, wanted_ST, rtol=1e-4, atol=1e-6 * float(wanted_ST.mean()))
        return found if close else None

    def _batch(self, gone_SE: Tensor) -> Tensor:
        """Return the errors of one batch of subsets, float64 [S]."""
        return self._sum(self._squares(gone_SE))

    def _sum(self, square_ST: Tensor) -> Tensor:
        """Return the sum of the norms of rows, from the squared errors of tokens."""
        square_SB = square_ST.view(len(square_ST), self._rows, -1).sum(2)
        # Rounding can make a sum that should be zero slightly negative.
        return square_SB.clamp_min(0).sqrt().sum(1)

    def _squares(self, gone_SE: Tensor) -> Tensor:
        """Return the squared error of every token, float64 [S, T]."""
        # δ with the subsets last, so that one product per token covers all of them.
        delta_TES = (self._weight_TE - self._without(gone_SE)).permute(1, 2, 0).contiguous()
        # ‖m + Σ δ f‖² = ‖m‖² + δ·(2 f·m + (f·f') δ) with m = z - y.
        change_TES = torch.baddbmm(self._cross_TE[:, :, None], self._gram_TEE, delta_TES, beta=2)
        square_TS = self._offset_T[:, None] + change_TES.mul_(delta_TES).sum(1)
        return square_TS.T

    def _own_bias(self) -> bool:
        """Whether the selection has a bias: a call has only one, so each subset needs a call."""
        parts = parts_of(self._block)
        return bool(parts.choice_biases or parts.arguments)

    def _without(self, gone_SE: Tensor) -> Tensor:
        """Return the router weights [S, T, E] of the block without some experts."""
        # Zeroed experts keep their tokens: nothing is rerouted, only their terms are missing.
        if self._state != "dropped":
            return self._weight_TE.masked_fill(gone_SE[:, None], 0)
        if self._own_bias():
            return torch.stack([self._rerouted(self._logits_TE, gone_E) for gone_E in gone_SE])
        low = torch.finfo(self._logits_TE.dtype).min / 4
        masked_STE = self._logits_TE.masked_fill(gone_SE[:, None], low)
        return self._rerouted(masked_STE.flatten(0, 1), None).view(masked_STE.shape)

    def _rerouted(self, logits_TE: Tensor, gone_E: Tensor | None) -> Tensor:
        """Return the weights [T, E] by the router's rule for these logits."""
        block = self._block
        gone = None if gone_E is None else gone_E.nonzero().flatten()
        weights = route(block.router, logits_TE, gone, given_by(block), parts_of(block))
        return dense_routing_weights(*weights, block.num_experts).double()


class ChoiceErrors:
    """Squared errors of tokens by selected experts, C sets of K, and each token's order of experts.

    If a token's experts are the first K remaining ones in its order, and their weights depend only
    on them, a subset's error is a lookup of the K experts that remain. There are far fewer sets of
    K experts than subsets: 1,820 of 4 out of 16 experts, compared with 11,440 of 7.
    """

    def __init__(self, kept_CE: Tensor, square_CT: Tensor, order_TE: Tensor) -> None:
        experts = kept_CE.shape[1]
        self._top_k = int(kept_CE[0].sum())
        self._bit_E = 2 ** torch.arange(experts, dtype=torch.int32, device=kept_CE.device)
        # A set of experts is stored as the bits of a number, with the index of each set of K.
        code_C = (kept_CE * self._bit_E).sum(1)
        self._place = torch.zeros(2**experts, dtype=torch.int64, device=kept_CE.device)
        self._place[code_C] = torch.arange(len(code_C), device=kept_CE.device)
        self._square_CT = square_CT.contiguous()
        self._rank_ET = self._bit_E[order_TE.T]

    def squares(self, gone_SE: Tensor) -> Tensor:
        """Return the squared error of every token without each subset, float64 [S, T]."""
        kept_S1 = ((~gone_SE) * self._bit_E).sum(1, dtype=torch.int32)[:, None]
        shape = (len(gone_SE), self._rank_ET.shape[1])
        chosen_ST = torch.zeros(shape, dtype=torch.int32, device=gone_SE.device)
        missing_ST = torch.full_like(chosen_ST, self._top_k)
        # The number of ranks that suffices even if all removed experts come first.
        for bit_T in self._rank_ET[: self._top_k + int(gone_SE.sum(1).max())]:
            taken_ST = (kept_S1 & bit_T).mul_(missing_ST > 0)
            chosen_ST |= taken_ST
            missing_ST -= (taken_ST > 0).int()
        return self._square_CT.gather(0, self._place[chosen_ST.long()])


def _chunks(x_TD: Tensor, missing_TD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(x_TD.split(EXPERT_CHUNK), missing_TD.split(EXPERT_CHUNK), strict=True)


def _inner_products(block: MoEBlock, x_TD: Tensor, missing_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Return f_e · (z - y) [T, E] and f_e · f_e' [T, E, E] of some tokens, float64."""
    views = (block.expert(expert) for expert in range(block.num_experts))
    # All experts on all tokens instead of routed ones, because after a removal a token may be
    # routed to any expert.
    outputs = [view.combine(view.hidden(x_TD)) for view in views]
    output_TED = torch.stack(outputs, dim=1).double() * block.routed_scale
    cross_TE = (output_TED @ missing_TD[:, :, None]).squeeze(2)
    return cross_TE, output_TED @ output_TED.mT
