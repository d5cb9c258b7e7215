"""PACT (Dhouib et al., CVPR 2025): remove unimportant tokens and cluster similar ones.

Shapes: I frames, M tokens of a frame, B samples, T text rows, R rows of one sample up to its last
image, D width, E width of keys, H heads, d a head's width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from bench.method import Context
from bench.models.vlm.decoder_view import Projection
from methods.token_pruning.base import TokenPruning, pairwise_cosine, top_tokens
from methods.token_pruning.sparsevlm import cluster_sums
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import SelectionSizes, TokenPruningStep
from methods.visual_engine.settings import Quota
from methods.visual_engine.weight_slices import project

# The scale d_c in the density, in units of distance.
DENSITY_SCALE = 2.0


class PACT(TokenPruning):
    """After `after` layers, keep the centres of clusters of the most important tokens.

    The importance of a token (EUTI) is the attention that it gets from the mean query of all rows
    up to the last image, with the same rows as keys, averaged over heads, times the L2 norm of the
    token's state. Queries and keys are those of the next layer, before rotation. A share `keep` of
    the tokens is important.

    Important tokens are clustered (DBDPC) by the cosine distance of their rotated keys: in order of
    decreasing density, a token becomes a centre unless there is a centre within `cutoff`. An
    unimportant token within `recover` · `cutoff` of its nearest centre joins that cluster; other
    unimportant tokens are removed. The mean of a cluster replaces its centre and, with
    `proportional`, stands for as many keys as the cluster has members (log w is added to its
    products).

    How many tokens are kept depends on the image, `cutoff` and `keep`. The defaults are those of
    the release (github.com/orailix/PACT, cf9a0c9), which clusters all images of a prompt together;
    here each frame is clustered separately.
    """

    label: ClassVar[str] = "pact"

    after: int = Field(default=4, ge=1)
    keep: float = Field(default=0.55, gt=0, le=1)
    cutoff: float = Field(default=0.21, ge=0, le=2)
    recover: float = Field(default=1.5, ge=0)
    proportional: bool = True

    def _steps(self, depth: int, context: Context) -> list[TokenPruningStep]:
        return [
            TokenPruningStep(
                self.label,
                self.after,
                Quota(share=self.keep),
                self._choose,
                macs=self._macs,
                adaptive=True,
                weighs=self.proportional,
            )
        ]

    def _choose(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        valid_IM = inputs.valid
        # 1e-9 corrects products that are slightly below a whole number.
        kept_I = (valid_IM.sum(dim=1) * self.keep + 1e-9).floor().long().clamp(min=1)
        kept_IM = top_tokens(importance(inputs), valid_IM, kept_I)
        keys_IME, _ = inputs.keys(upcoming=True)
        distance_IMM = (1 - pairwise_cosine(keys_IME)).clamp(min=0)
        distance_IMM.diagonal(dim1=1, dim2=2).zero_()
        centre_IM = density_centres(distance_IMM, kept_IM, self.cutoff)
        apart_IMM = distance_IMM.masked_fill(~centre_IM[:, None, :], torch.inf)
        nearest_IM, owner_IM = apart_IMM.min(dim=2)
        member_IM = kept_IM | (valid_IM & (nearest_IM <= self.recover * self.cutoff))
        sums_IMD = cluster_sums(inputs.states_IMD, member_IM, owner_IM)
        size_IM = cluster_sums(member_IM[..., None].to(sums_IMD), member_IM, owner_IM)[..., 0]
        size_IM = size_IM.clamp(min=1)
        means_IMD = sums_IMD / size_IM[..., None]
        weight_IM = size_IM if self.proportional else None
        return TokenSelection(centre_IM, centre_IM, means_IMD, weight_IM=weight_IM)

    def _macs(self, sizes: SelectionSizes) -> float:
        """Return the multiply-adds of queries and keys, before and after rotation, and products.

        Those before rotation are of the rows up to the last image, which is exact if all prompts
        have the same number of words after it.
        """
        text, visual = sizes.samples * sizes.text, sum(sizes.counts)
        before = text - sizes.samples * sizes.question_rows + visual
        key = sizes.groups * sizes.head_dim
        query = sizes.query_heads * sizes.head_dim
        importance = before * (sizes.width * (query + key) + query)
        rotated = sizes.width * (query * text + key * (text + visual))
        return importance + rotated + sizes.pairs * key


def importance(inputs: SelectionInputs) -> Tensor:
    """Return the importance of each visual token (see `PACT`), float32 [I, M]."""
    view = inputs.ahead.qk().weights.view
    before_BT = inputs.text.keys_valid & ~inputs.question_rows()
    score_IM = torch.zeros_like(inputs.valid, dtype=torch.float32)

    def heads(x_RD: Tensor, linear: Projection, norm: nn.Module | None) -> Tensor:
        x_RHd: Tensor = project(x_RD, linear).unflatten(-1, (-1, view.head_dim))
        normed_RHd: Tensor = x_RHd if norm is None else norm(x_RHd)
        return normed_RHd.transpose(0, 1).float()

    for sample, text_TD in enumerate(inputs.text_BTD):
        frames = (inputs.frames.sample_I == sample).nonzero()[:, 0]
        own_IM = inputs.valid & (inputs.frames.sample_I == sample)[:, None]
        if not len(frames):
            continue
        visual_VD = inputs.states_IMD[own_IM]
        rows_RD = inputs.ahead.attention_norm(torch.cat([text_TD[before_BT[sample]], visual_VD]))
        mean_H1d = heads(rows_RD, view.q, view.q_norm).mean(dim=1, keepdim=True)
        keys_HRd = heads(rows_RD, view.k, view.k_norm).repeat_interleave(
            view.heads // view.groups, dim=0
        )
        products_H1R = mean_H1d @ keys_HRd.transpose(1, 2) * view.scaling
        share_R = products_H1R.softmax(dim=-1).mean(dim=0)[0]
        norm_V = visual_VD.float().norm(dim=-1)
        score_IM[own_IM] = share_R[-len(visual_VD) :] * norm_V
    return score_IM


def density_centres(distance_IMM: Tensor, member_IM: Tensor, cutoff: float) -> Tensor:
    """Mark the members that are centres of clusters, bool [I, M].

    The density of a member is the sum of exp(-(d / 2)²) over all members. In order of decreasing
    density, ties by position, a member becomes a centre unless there is one within `cutoff`.
    Centres are thus more than `cutoff` apart, and every member is within `cutoff` of a centre.
    """
    density_IMM = (-((distance_IMM / DENSITY_SCALE) ** 2)).exp()
    density_IM = (density_IMM * member_IM[:, None, :]).sum(dim=2).masked_fill(~member_IM, -1)
    rank_IM = density_IM.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    near_IMM = distance_IMM <= cutoff
    denser_near_IMM = near_IMM & (rank_IM[:, None, :] < rank_IM[:, :, None])
    centre_IM, open_IM = torch.zeros_like(member_IM), member_IM.clone()
    # In rounds instead of member by member: an undecided member without an undecided denser one
    # within the cutoff is a centre, which decides all members within the cutoff.
    while bool(open_IM.any()):
        new_IM = open_IM & ~(denser_near_IMM & open_IM[:, None, :]).any(dim=2)
        centre_IM |= new_IM
        open_IM &= ~(new_IM | (near_IMM & new_IM[:, None, :]).any(dim=2))
    return centre_IM
