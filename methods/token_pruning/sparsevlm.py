"""SparseVLM (Zhang et al., ICML 2025): words of the question rate the visual tokens."""

from __future__ import annotations

from math import ceil
from typing import Literal

import torch
from torch import Tensor

from bench.errors import UserError
from bench.method import Context
from methods.token_pruning.density_peaks import clusters, summed
from methods.token_pruning.pruning import TokenPruning
from methods.token_pruning.ranking import best
from methods.token_pruning.raters import raters
from methods.visual_tokens.plan import Selection
from methods.visual_tokens.quota import Quota
from methods.visual_tokens.rows import rows_where
from methods.visual_tokens.sight import Choice, Sight
from methods.visual_tokens.sizes import Sizes

# The release's fixed tables for LLaVA-1.5, by average: tokens left of 576 after each pruning step.
TABLES = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}
TABLE_TOKENS, TABLE_LAYERS, TABLE_DEPTH = 576, (2, 6, 15), 32
# Share of the removed tokens that is recycled, and tokens per cluster.
RECYCLED, CLUSTER = 0.3, 10


class SparseVLM(TokenPruning):
    """Keep, after layers 2, 6 and 15 of 32, the tokens to which the raters attend most.

    Raters are the words after the image whose input embeddings are more similar to it than the
    average. `average` names the release's table for LLaVA-1.5; `keep` replaces it by shares of the
    frame. Token counts are applied as shares and layers as fractions of the depth, so that both
    carry over to different models. With `recycle`, the best 30 % of the removed tokens are
    clustered by density peaks, about ten per cluster, and the cluster sums stay at the positions of
    the centres. The paper's alternative, a number of tokens derived from the rank of the attention,
    is not offered: budgets would differ from image to image.
    """

    average: Literal[192, 128, 64] = 192
    keep: tuple[float, ...] | None = None
    layers: tuple[int, ...] | None = None
    recycle: bool = True

    def _selections(self, depth: int, context: Context) -> list[Selection]:
        shares = self.keep or tuple(left / TABLE_TOKENS for left in TABLES[self.average])
        scaled = tuple(max(1, round(layer * depth / TABLE_DEPTH)) for layer in TABLE_LAYERS)
        layers = self.layers or scaled
        if len(layers) != len(shares) or sorted(set(layers)) != list(layers) or layers[0] < 1:
            raise UserError(
                f"layers={list(layers)} with {len(shares)} shares: give one share for each layer; "
                "layers must increase and start at 1 or later"
            )
        if not all(0 < share <= 1 for share in shares):
            raise UserError(f"keep={list(shares)}: each share of the frame must be in (0, 1]")
        recycled = RECYCLED / CLUSTER if self.recycle else 0.0
        return [
            Selection(
                "sparsevlm",
                after,
                Quota(share, recycled=recycled),
                self._choose,
                attention=True,
                macs=self._macs,
            )
            for after, share in zip(layers, shares, strict=True)
        ]

    def _choose(self, sight: Sight, keep_I: Tensor) -> Choice:
        rating = rows_where(self._raters(sight))
        weight_IRM = sight.attention(rating)
        # `attention` is per frame, raters are per sample: padded raters of shorter samples hold
        # copies of other rows and must not enter the mean.
        real_IR1 = rating.validity[sight.frames.sample_I][..., None]
        score_IM = torch.where(real_IR1, weight_IRM, 0).sum(dim=1) / real_IR1.sum(dim=1)
        kept_IM = best(score_IM, sight.valid, keep_I)
        return self._recycled(sight, score_IM, kept_IM) if self.recycle else Choice(kept_IM)

    def _macs(self, sizes: Sizes) -> float:
        """Charge the choice of raters, their attention, and the distances of clustering.

        How many words are more similar to the image than the average is unknown before running:
        half of the question is assumed.
        """
        rating = sizes.samples * sizes.entered * sizes.text * sizes.width
        attending = ceil(sizes.asked / 2) * sizes.row_macs
        return rating + attending + (sizes.pairs * sizes.width if self.recycle else 0)

    def _raters(self, sight: Sight) -> Tensor:
        door = sight.entered
        return raters(door.visual_BND, door.visual_valid_BN, door.text_BTD, sight.asked())

    def _recycled(self, sight: Sight, score_IM: Tensor, kept_IM: Tensor) -> Choice:
        """Add the clusters of the best removed tokens to the kept ones."""
        gone_IM = sight.valid & ~kept_IM
        gone_I = gone_IM.sum(dim=1)
        # Must equal Quota.merged, from which costs are counted. The 1e-9 keeps a product that is a
        # whole number from rounding down to the one below.
        count_I = torch.where(gone_I > 0, (gone_I * RECYCLED / CLUSTER + 1e-9).long() + 1, 0)
        # A cluster needs a member: with few removed tokens, the pool holds one per cluster.
        pool_I = torch.maximum((gone_I * RECYCLED + 1e-9).long(), count_I)
        pool_IM = best(score_IM, gone_IM, pool_I)
        centre_IM, owner_IM = clusters(sight.states_IMD, pool_IM, count_I)
        sums_IMD = summed(sight.states_IMD, pool_IM, owner_IM)
        return Choice(kept_IM | centre_IM, centre_IM, sums_IMD)
