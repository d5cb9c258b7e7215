"""DivPrune (CVPR 2025): max-min diversity. Shapes: I frames, M tokens of a frame, D width."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from methods.token_pruning.base import BeforeDecoder, pairwise_cosine
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import SelectionSizes


class DivPrune(BeforeDecoder):
    """Choose projected tokens greedily, each as far as possible from the nearest chosen one."""

    label: ClassVar[str] = "divprune"

    def _choose(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        return TokenSelection(farthest_points(inputs.states_IMD, inputs.valid, keep_I))

    def _macs(self, sizes: SelectionSizes) -> float:
        return sizes.pairs * sizes.width


def farthest_points(x_IMD: Tensor, valid_IM: Tensor, keep_I: Tensor) -> Tensor:
    """Choose tokens that are far from each other in the distance d = 1 - cos, bool [I, M].

    The first one is the token whose nearest other token is farthest away; each further one is the
    token whose nearest chosen token is farthest away.
    """
    distance_IMM = 1 - pairwise_cosine(x_IMD)
    pair_IMM = valid_IM[:, :, None] & valid_IM[:, None, :]
    itself_MM = torch.eye(x_IMD.shape[1], dtype=torch.bool, device=x_IMD.device)
    others_IMM = distance_IMM.masked_fill(~pair_IMM | itself_MM, torch.inf)
    nearest_IM = others_IMM.amin(dim=2)
    chosen_IM = torch.zeros_like(valid_IM)
    frame_I = torch.arange(len(x_IMD), device=x_IMD.device)
    for step in range(int(keep_I.max())):
        free_IM = valid_IM & ~chosen_IM
        next_I = nearest_IM.masked_fill(~free_IM, -torch.inf).argmax(dim=1)
        chosen_IM[frame_I, next_I] |= step < keep_I
        found_IM = distance_IMM[frame_I, next_I]
        # Before the first choice, `nearest` is the distance to any other token and not to a chosen
        # one, so the first update replaces it.
        nearest_IM = found_IM if step == 0 else torch.minimum(nearest_IM, found_IM)
    return chosen_IM
