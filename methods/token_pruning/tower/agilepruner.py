"""AgilePruner (Baek et al., ICLR 2026): attention for simple images, diversity for rich ones.

Shapes: I frames, M tokens of a frame, F width.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from bench.models.vlm.vision_tower import TowerSizes
from methods.token_pruning.base import BeforeDecoder, top_tokens
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import SelectionSizes

# Increase of the threshold per position in the order of attention, for an image of average rank.
STEP = 0.01


class AgilePruner(BeforeDecoder):
    """Take tokens in order of the class token's attention, and drop those close to a taken one.

    A token is dropped if its cosine distance to an earlier taken token is below that token's
    threshold min(`threshold`, i · 0.01 · erank / `average_rank`), where i is its position in the
    order, from 1, and erank the effective rank of the frame's features, which are the inputs of the
    projector. Tokens of richer images are thus farther apart (cvsp-lab.github.io/AgilePruner).

    The paper's code is not released, and it gives no values for these options. The defaults are
    those of a public port (github.com/AnKun10/OE-VLM-Demo, 3e85e0b), which takes 95 from the
    paper's appendix, a mean over LLaVA's training images, and states no source for 0.25. As in that
    port, dropped tokens are added back in order of attention if fewer than `keep` are left.
    """

    label: ClassVar[str] = "agilepruner"
    reads_tower: ClassVar[bool] = True

    threshold: float = Field(default=0.25, ge=0, le=2)
    average_rank: float = Field(default=95.0, gt=0)

    def _choose(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        tower, valid_IM = inputs.require_tower_output(), inputs.valid
        products_IMM = token_products(tower.features_VF, valid_IM)
        scale_I = STEP * effective_rank(products_IMM) / self.average_rank
        place_M = torch.arange(1, valid_IM.shape[1] + 1, device=valid_IM.device)
        threshold_IM = (scale_I[:, None] * place_M).clamp(max=self.threshold)
        order_IM = tower.received_V.masked_fill(~valid_IM, -torch.inf).argsort(
            dim=1, descending=True, stable=True
        )
        apart_IM = take_apart(cosine_distances(products_IMM), order_IM, threshold_IM)
        taken_IM = apart_IM & valid_IM
        # Taken tokens first, then dropped ones, both in order of attention.
        rank_IM = order_IM.argsort(dim=1) + (~taken_IM).long() * valid_IM.shape[1]
        return TokenSelection(top_tokens(-rank_IM.float(), valid_IM, keep_I))

    def _macs(self, sizes: SelectionSizes) -> float:
        tower = cast(TowerSizes, sizes.tower)
        return tower.reading_macs + sizes.pairs * tower.features


def token_products(x_IMF: Tensor, valid_IM: Tensor) -> Tensor:
    """Return the inner product of every pair of tokens of a frame, [I, M, M]; 0 for padding."""
    # In float64, because singular values are the square roots of this matrix's eigenvalues, and
    # float32 would be too coarse for the many small ones.
    x_IMF = x_IMF.double().masked_fill(~valid_IM[..., None], 0)
    return x_IMF @ x_IMF.transpose(1, 2)


def effective_rank(products_IMM: Tensor) -> Tensor:
    """Return the effective rank of each frame's tokens from their inner products, [I].

    It is exp(-Σ p log p) with the singular values p, divided by their sum (Roy and Vetterli, 2007);
    0 if all tokens are zero.
    """
    sigma_IM = torch.linalg.eigvalsh(products_IMM).clamp(min=0).sqrt()
    total_I1 = sigma_IM.sum(dim=1, keepdim=True)
    share_IM = sigma_IM / total_I1.clamp(min=torch.finfo(sigma_IM.dtype).tiny)
    entropy_I: Tensor = torch.special.entr(share_IM).sum(dim=1)
    return entropy_I.exp().masked_fill(total_I1[:, 0] == 0, 0)


def cosine_distances(products_IMM: Tensor) -> Tensor:
    """Return one minus the cosine of every pair of tokens from their inner products, [I, M, M]."""
    norm_IM = products_IMM.diagonal(dim1=1, dim2=2).sqrt()
    pair_IMM = norm_IM[:, :, None] * norm_IM[:, None, :]
    return 1 - products_IMM / pair_IMM.clamp(min=torch.finfo(pair_IMM.dtype).tiny)


def take_apart(distance_IMM: Tensor, order_IM: Tensor, threshold_IM: Tensor) -> Tensor:
    """Mark tokens in order unless a marked one is closer than its own threshold, [I, M].

    `order_IM` are the token indices in order, `threshold_IM` the thresholds in the same order.
    """
    frames_I1 = torch.arange(len(order_IM), device=order_IM.device)[:, None]
    sorted_IMM = distance_IMM[frames_I1[..., None], order_IM[:, :, None], order_IM[:, None, :]]
    near_IMM = sorted_IMM < threshold_IM[:, :, None]
    open_IM = torch.ones_like(order_IM, dtype=torch.bool)
    for place in range(order_IM.shape[1]):
        # Only later tokens: earlier ones are decided.
        taken_I1 = open_IM[:, place, None]
        open_IM[:, place + 1 :] &= ~(near_IMM[:, place, place + 1 :] & taken_I1)
    return torch.zeros_like(open_IM).scatter(1, order_IM, open_IM)
