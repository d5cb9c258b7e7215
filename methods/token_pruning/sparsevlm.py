"""SparseVLM (Zhang et al., ICML 2025): the question's visual words rate the image's tokens."""

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

# Tokens left of 576 after each selection, by their average: the release's fixed tables.
TABLES = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}
TABLE_TOKENS, TABLE_LAYERS, TABLE_DEPTH = 576, (2, 6, 15), 32
# Of the tokens that go, this share is recycled, ten to a cluster.
RECYCLED, CLUSTER = 0.3, 10


class SparseVLM(TokenPruning):
    """Keep, after layers 2, 6 and 15 of 32, the tokens to which the raters attend most.

    Raters are the words after the image that are more similar to it than the average, in the
    embeddings that enter the decoder. `average` names the release's table for LLaVA-1.5; `keep`
    replaces it by shares of the frame. Both are taken as shares and layers as parts of the depth,
    so that they mean the same in other models. With `recycle`, the best 30 % of the tokens that go
    are clustered by density peaks, about ten to a cluster, and their sums stay at the places of
    the clusters' centres. The number that the paper derives from the rank of the attention instead
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
                f"layers={list(layers)} and {len(shares)} shares: one share for each of some "
                "rising numbers of layers, the first at least 1"
            )
        if not all(0 < share <= 1 for share in shares):
            raise UserError(f"keep={list(shares)}: shares of the frame, above 0 and at most 1")
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
        real_IR1 = rating.validity[sight.frames.sample_I][..., None]
        score_IM = torch.where(real_IR1, weight_IRM, 0).sum(dim=1) / real_IR1.sum(dim=1)
        kept_IM = best(score_IM, sight.valid, keep_I)
        return self._recycled(sight, score_IM, kept_IM) if self.recycle else Choice(kept_IM)

    def _macs(self, sizes: Sizes) -> float:
        """Charge the raters' choice, their attention, and the distances of clustering.

        Which words are more similar to the image than the average is not known without running
        it: half of the question is taken.
        """
        rating = sizes.samples * sizes.entered * sizes.text * sizes.width
        attending = ceil(sizes.asked / 2) * sizes.row_macs
        return rating + attending + (sizes.pairs * sizes.width if self.recycle else 0)

    def _raters(self, sight: Sight) -> Tensor:
        """Return the raters among the text rows, from embeddings."""
        door = sight.entered
        return raters(door.visual_BND, door.visual_valid_BN, door.text_BTD, sight.asked())

    def _recycled(self, sight: Sight, score_IM: Tensor, kept_IM: Tensor) -> Choice:
        """Return the choice with clusters of the best tokens that go."""
        gone_IM = sight.valid & ~kept_IM
        gone_I = gone_IM.sum(dim=1)
        count_I = torch.where(gone_I > 0, (gone_I * RECYCLED / CLUSTER + 1e-9).long() + 1, 0)
        pool_I = torch.maximum((gone_I * RECYCLED + 1e-9).long(), count_I)
        pool_IM = best(score_IM, gone_IM, pool_I)
        centre_IM, owner_IM = clusters(sight.states_IMD, pool_IM, count_I)
        sums_IMD = summed(sight.states_IMD, pool_IM, owner_IM)
        return Choice(kept_IM | centre_IM, centre_IM, sums_IMD)
