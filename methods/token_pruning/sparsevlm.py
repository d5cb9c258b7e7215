"""SparseVLM (ICML 2025): tokens are rated by words that refer to the image, and partly recycled.

Recycled tokens are clustered by density peaks. Shapes: B samples, N visual rows, T text rows, I
frames, M tokens of a frame, R raters, D width.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bench.errors import UserError
from bench.method import Context
from methods.token_pruning.base import TokenPruning, Variant, pairwise_cosine, top_tokens
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import SelectionSizes, TokenPruningStep
from methods.visual_engine.settings import Quota
from methods.visual_engine.token_index import rows_where

# Tables of the release for LLaVA-1.5, by average: tokens left of 576 after each pruning step.
RELEASED_TABLES = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}
TABLE_TOKENS, TABLE_LAYERS, TABLE_DEPTH = 576, (2, 6, 15), 32

# In the release, layers 2, 6 and 15 count from 0: each runs in full, and its outputs are pruned by
# its own attention.
RELEASED_LAYERS = tuple(layer + 1 for layer in TABLE_LAYERS)

# Share of the removed tokens that is recycled, and tokens per cluster.
RECYCLED_SHARE, CLUSTER_SIZE = 0.3, 10


class SparseVLM(TokenPruning):
    """Keep, after layers 2, 6 and 15 of 32, the tokens to which the raters attend most.

    Raters are the words after the image whose input embeddings are more similar to the image than
    the average word. `average` selects one of the release's tables for LLaVA-1.5; `keep` replaces
    it by shares of the frame. Token counts are used as shares and layers as fractions of the depth,
    so that both apply to other models. With `recycle`, the best 30 % of the removed tokens are
    clustered by density peaks, about ten per cluster, and each cluster is merged at the position of
    its centre.

    With `rank_factor` (λ), the image determines the number of tokens, as in the paper: of m tokens,
    ⌊λ (m - rank P)⌋ are removed after each layer, where P is the raters' attention to them. The
    paper states no λ, and the release does not compute a rank.

    With `variant=paper`, raters are at least as similar as the average, a removed token joins the
    centre of highest cosine, and a cluster becomes the sum of its tokens. With `variant=release`
    (version 1), layers 2, 6 and 15 themselves still run in full, raters are more similar than the
    average, a token joins the nearest centre, a cluster becomes the mean of its tokens, one more
    token is recycled, and with `positions=renumbered` clusters come after the kept tokens.
    """

    label: ClassVar[str] = "sparsevlm"

    variant: Variant = "paper"

    average: Literal[192, 128, 64] = 192
    keep: tuple[float, ...] | None = None
    layers: tuple[int, ...] | None = None
    recycle: bool = True
    rank_factor: float | None = Field(default=None, gt=0, le=1)

    def _steps(self, depth: int, context: Context) -> list[TokenPruningStep]:
        shares, layers = self.keep, self.layers
        if shares is None:
            shares = tuple(left / TABLE_TOKENS for left in RELEASED_TABLES[self.average])
        if layers is None:
            table = RELEASED_LAYERS if self.variant == "release" else TABLE_LAYERS
            layers = tuple(max(1, round(layer * depth / TABLE_DEPTH)) for layer in table)
        by_rank = self.rank_factor is not None
        if by_rank and self.keep is not None:
            raise UserError(
                f"keep={list(shares)} and rank_factor={self.rank_factor}: set one of them, and the "
                "other to null"
            )
        if by_rank:
            shares = (1.0,) * len(layers)
        # An empty list is refused below as too short; it does not select the defaults.
        increasing = sorted(set(layers)) == list(layers) and min(layers, default=0) >= 1
        if len(layers) != len(shares) or not increasing:
            raise UserError(
                f"layers={list(layers)} with {len(shares)} shares: give one share for each layer; "
                "layers must increase and start at 1 or later"
            )
        if not all(0 < share <= 1 for share in shares):
            raise UserError(f"keep={list(shares)}: each share of the frame must be in (0, 1]")
        return [
            TokenPruningStep(
                self.label,
                after,
                replace(self._recycling, share=share),
                self._choose,
                attention=True,
                macs=self._macs,
                adaptive=by_rank,
            )
            for after, share in zip(layers, shares, strict=True)
        ]

    @property
    def _recycling(self) -> Quota:
        """A quota that keeps only recycled tokens, used for their number and their cost."""
        share, extra = RECYCLED_SHARE * self.recycle, int(self.variant == "release")
        return Quota(recycled=share, pool_extra=extra, cluster_size=CLUSTER_SIZE)

    def _choose(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        rating = rows_where(self._raters(inputs))
        weight_IRM = inputs.attention(rating)
        # Padded raters of shorter samples hold copies of other rows and must not enter the mean.
        real_IR1 = rating.validity[inputs.frames.sample_I][..., None]
        score_IM = torch.where(real_IR1, weight_IRM, 0).sum(dim=1) / real_IR1.sum(dim=1)
        if self.rank_factor is not None:
            keep_I = kept_by_rank(weight_IRM, real_IR1[..., 0], inputs.valid, self.rank_factor)
        kept_IM = top_tokens(score_IM, inputs.valid, keep_I)
        if not self.recycle:
            return TokenSelection(kept_IM)
        return self._recycled(inputs, score_IM, kept_IM)

    def _macs(self, sizes: SelectionSizes) -> float:
        """Return the multiply-adds of the choice of raters, their attention, and the clustering.

        The number of raters is unknown before the run; half of the question is assumed.
        """
        rating = sizes.samples * sizes.input_visual_rows * sizes.text * sizes.width
        attending = ceil(sizes.question_rows / 2) * sizes.row_macs
        # Distances, and for `variant=paper` also cosines.
        comparisons = self.recycle * (2 if self.variant == "paper" else 1)
        return rating + attending + comparisons * sizes.pairs * sizes.width

    def _raters(self, inputs: SelectionInputs) -> Tensor:
        embeddings, question_BT = inputs.input_embeddings, inputs.require_question_rows()
        return select_raters(
            embeddings.visual_BND,
            embeddings.visual_valid_BN,
            embeddings.text_BTD,
            question_BT,
            strict=self.variant == "release",
        )

    def _recycled(
        self, inputs: SelectionInputs, score_IM: Tensor, kept_IM: Tensor
    ) -> TokenSelection:
        """Add the clusters of the best removed tokens to the kept ones."""
        gone_IM = inputs.valid & ~kept_IM
        gone, quota = gone_IM.sum(dim=1).tolist(), self._recycling
        count_I = torch.tensor([quota.merged(g) for g in gone], device=kept_IM.device)
        # Every cluster needs a member, so with few removed tokens the pool has one per cluster.
        pooled_I = torch.tensor([quota.pooled(g) for g in gone], device=kept_IM.device)
        pool_IM = top_tokens(score_IM, gone_IM, torch.maximum(pooled_I, count_I))
        states_IMD = inputs.states_IMD
        centre_IM, owner_IM, peak_IM = cluster_by_density(states_IMD, pool_IM, count_I)
        if self.variant == "paper":
            sums_IMD = cluster_sums(states_IMD, pool_IM, most_similar(states_IMD, centre_IM))
            return TokenSelection(kept_IM | centre_IM, centre_IM, sums_IMD)
        sums_IMD = cluster_sums(states_IMD, pool_IM, owner_IM)
        size_IM1 = cluster_sums(pool_IM[..., None].to(sums_IMD), pool_IM, owner_IM)
        # Clusters come after the kept tokens, the highest peak first. A peak relative to the
        # highest one is at most 1.
        place_IM = torch.arange(kept_IM.shape[1], device=kept_IM.device).float()
        behind_IM = kept_IM.shape[1] + 1 - peak_IM / peak_IM.amax(dim=1, keepdim=True).clamp(1e-30)
        order_IM = torch.where(centre_IM, behind_IM, place_IM)
        means_IMD = sums_IMD / size_IM1.clamp(min=1)
        return TokenSelection(kept_IM | centre_IM, centre_IM, means_IMD, order_IM)


def kept_by_rank(weight_IRM: Tensor, rater_IR: Tensor, valid_IM: Tensor, factor: float) -> Tensor:
    """Return how many of each frame's m tokens to keep: m - ⌊factor (m - rank)⌋, at least 1, [I].

    The rank is that of the raters' attention to the frame's tokens, in float32 with the tolerance
    of `torch.linalg.matrix_rank`.
    """
    real_IRM = torch.where(rater_IR[..., None] & valid_IM[:, None], weight_IRM.float(), 0)
    # Padding becomes zero rows and columns, which do not change the rank.
    rank_I: Tensor = torch.linalg.matrix_rank(real_IRM)
    count_I = valid_IM.sum(dim=1)
    leaving_I = (factor * (count_I - rank_I)).floor().long()
    return (count_I - leaving_I).clamp(min=1)


def select_raters(
    visual_BND: Tensor,
    visual_valid_BN: Tensor,
    text_BTD: Tensor,
    question_BT: Tensor,
    *,
    strict: bool = False,
) -> Tensor:
    """Mark the question's tokens that are at least as similar to the image as the average, [B, T].

    The similarity of a word is the mean over visual tokens of softmax(H_v H_qᵀ), where the softmax
    is over the question's words. With `strict`, words must be above the average, unless none is.
    """
    product_BNT = visual_BND.float() @ text_BTD.float().transpose(1, 2)
    share_BNT = product_BNT.masked_fill(~question_BT[:, None, :], -torch.inf).softmax(dim=-1)
    # For a sample without words after its image the softmax is NaN; it has no raters.
    share_BNT = share_BNT.nan_to_num(0) * visual_valid_BN[:, :, None]
    mean_BT = share_BNT.sum(dim=1) / visual_valid_BN.sum(dim=1, keepdim=True).clamp(min=1)
    average_B1 = 1 / question_BT.sum(dim=1, keepdim=True).clamp(min=1)
    # The average of a softmax over w words is 1 / w. Without the tolerance, rounding could exclude
    # a single word, which is exactly average.
    at_least_BT = question_BT & (mean_BT >= average_B1 - 1e-6)
    above_BT = question_BT & (mean_BT > average_B1 + 1e-6)
    # A single word is exactly average. Without a fallback the mean over raters would be 0 / 0, as
    # in the release.
    any_above_B1 = above_BT.any(dim=1, keepdim=True)
    return torch.where(any_above_B1, above_BT, at_least_BT) if strict else at_least_BT


def most_similar(x_IMD: Tensor, centre_IM: Tensor) -> Tensor:
    """Return the position of the centre of highest cosine for each token, [I, M].

    A centre belongs to itself.
    """
    cosine_IMM = pairwise_cosine(x_IMD).masked_fill(~centre_IM[:, None, :], -torch.inf)
    itself_M = torch.arange(x_IMD.shape[1], device=x_IMD.device)
    return torch.where(centre_IM, itself_M, cosine_IMM.argmax(dim=2))


def cluster_by_density(
    x_IMD: Tensor, member_IM: Tensor, count_I: Tensor, nearest: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster each frame's members into `count` clusters; return centres, owners and peaks.

    Distances are Euclidean, divided by √D. The density of a member is exp(-mean d²) over its
    `count` nearest members, or at most `nearest` of them, itself included. Its isolation is the
    distance to the nearest member of higher density; for the densest one it is the largest
    distance. The members with the highest product of both become centres (bool [I, M]), and every
    other member belongs to its nearest centre. Owners [I, M] are positions of centres, peaks [I, M]
    the products.
    """
    distance_IMM = torch.cdist(x_IMD.float(), x_IMD.float()) / x_IMD.shape[-1] ** 0.5
    pair_IMM = member_IM[:, :, None] & member_IM[:, None, :]
    sorted_IMM = distance_IMM.masked_fill(~pair_IMM, torch.inf).sort(dim=2).values
    nearest_I = count_I.clamp(min=1, max=nearest).minimum(member_IM.sum(dim=1).clamp(min=1))
    place_I = (nearest_I - 1)[:, None, None].expand(-1, x_IMD.shape[1], 1)
    # Sorting puts pairs with non-members (inf) last, so the k nearest members are a prefix. Its
    # mean comes from a cumulative sum, since k differs between frames.
    mean_IM = sorted_IMM.square().cumsum(dim=2).gather(2, place_I)[..., 0] / nearest_I[:, None]
    density_IM = (-mean_IM).exp()
    denser_IMM = (density_IM[:, None, :] > density_IM[:, :, None]) & pair_IMM
    farthest_I = distance_IMM.masked_fill(~pair_IMM, 0).flatten(1).amax(dim=1)
    # The densest member gets inf here, which the next line limits to the frame's largest distance.
    apart_IM = distance_IMM.masked_fill(~denser_IMM, torch.inf).amin(dim=2)
    apart_IM = torch.minimum(apart_IM, farthest_I[:, None])
    peak_IM = density_IM * apart_IM
    centre_IM = top_tokens(peak_IM, member_IM, count_I)
    owner_IM = distance_IMM.masked_fill(~centre_IM[:, None, :], torch.inf).argmin(dim=2)
    itself_M = torch.arange(x_IMD.shape[1], device=x_IMD.device)
    return centre_IM, torch.where(centre_IM, itself_M, owner_IM), peak_IM


def cluster_sums(x_IMD: Tensor, member_IM: Tensor, owner_IM: Tensor) -> Tensor:
    """Sum the tokens of each cluster at the position of its centre, [I, M, D]."""
    index_IMD = owner_IM[..., None].expand_as(x_IMD)
    parts_IMD = torch.where(member_IM[..., None], x_IMD, 0)
    return torch.zeros_like(x_IMD).scatter_add(1, index_IMD, parts_IMD)
