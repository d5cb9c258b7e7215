"""HoliTom (Shao et al., NeurIPS 2025): merge what does not change over frames, then prune.

Shapes: I frames, M tokens of a frame, F frames of one prompt, n tokens of one of them, D width; V
tokens of all frames of one prompt in the decoder, K of them kept, R removed.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from bench.method import Context
from bench.models.vlm.vision_tower import TowerSizes
from methods.token_pruning.base import TokenPruning, frames_of_samples, top_tokens
from methods.token_pruning.sparsevlm import cluster_by_density
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import SelectionSizes, TokenPruningStep
from methods.visual_engine.settings import Quota


class HoliTom(TokenPruning):
    """Merge tokens that do not change over frames, keep attended ones, then prune in the decoder.

    Before the decoder, the frames of a prompt (images of equal size, or time steps of a video) are
    divided into windows such that most tokens repeat. A position is static in a window if its
    cosine between successive frames is always above `threshold`; it is replaced by its mean over
    the window, in the first frame of the window. Of the remaining tokens a share is kept, which is
    chosen such that `keep` of all tokens are left: in every frame the non-static tokens with most
    attention in the vision tower, and of the static ones the centres of clusters by density peaks
    (with as many nearest members as clusters, at most `neighbours`). A centre becomes `centre`
    times itself plus the rest times the mean of its members.

    At the fraction `layer` of the decoder's depth, the share `drop` of all tokens of a prompt to
    which its last token attends least in the layer before is removed. Each is folded into the kept
    token of highest cosine, in order of position: that token becomes the mean of its current value
    and the removed one. In this part tokens keep their positions, whatever `positions` says.

    The defaults are those of the release's scripts (github.com/cokeshao/HoliTom, e9b2972): layer 18
    of 28, and one half. The tower's attention is that of the class token if there is one, and
    otherwise from all patches. Every prompt has its own share, while the release uses the share of
    one prompt for the next one of a batch. A frame that would lose all tokens keeps its most
    attended one.
    """

    label: ClassVar[str] = "holitom"
    reads_tower: ClassVar[bool] = True

    keep: float = Field(default=0.25, gt=0, le=1)
    threshold: float = Field(default=0.8, ge=-1, le=1)
    centre: float = Field(default=0.6, ge=0, le=1)
    neighbours: int = Field(default=7, ge=1)
    layer: float = Field(default=18 / 28, gt=0, lt=1)
    drop: float = Field(default=0.5, ge=0, lt=1)

    def _steps(self, depth: int, context: Context) -> list[TokenPruningStep]:
        # Adaptive: the number of static positions depends on the frames.
        before = TokenPruningStep(
            self.label,
            0,
            Quota.of("all"),
            self._choose,
            reads_tower=True,
            macs=self._macs,
            adaptive=True,
        )
        inside = TokenPruningStep(
            self.label,
            max(1, round(self.layer * depth)),
            Quota.of("all"),
            self._fold,
            attention=True,
            macs=_folding_macs,
            adaptive=True,
        )
        return [before, inside] if self.drop else [before]

    def _placed_steps(self, depth: int, context: Context) -> list[TokenPruningStep]:
        first, *rest = super()._placed_steps(depth, context)
        return [first, *(replace(step, renumbers=False) for step in rest)]

    def _choose(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        attention_IM = inputs.require_tower_output().received_V
        kept_IM = torch.zeros_like(inputs.valid)
        changed_IM, states_IMD = kept_IM.clone(), inputs.states_IMD.clone()
        place_M = torch.arange(kept_IM.shape[1], device=kept_IM.device)
        # Static tokens come before the others of their frame.
        order_IM = (place_M + kept_IM.shape[1]).repeat(len(kept_IM), 1)
        for frames in frames_of_samples(inputs, self.label):
            count = inputs.frames.counts[frames[0]]
            x_FnD = inputs.states_IMD[frames, :count]
            similar = functional.cosine_similarity(x_FnD[:-1].float(), x_FnD[1:].float(), dim=-1)
            windows = static_windows(similar > self.threshold)
            gain = sum((last - first) * int(same_n.sum()) for first, last, same_n in windows)
            share = min(1.0, self.keep / (1 - gain / (len(frames) * count)))
            for first, last, same_n in windows:
                moving_P = (~same_n).nonzero()[:, 0]
                wanted = ceil(len(moving_P) * share)
                for frame in frames[first : last + 1]:
                    best = attention_IM[frame, moving_P].argsort(descending=True, stable=True)
                    kept_IM[frame, moving_P[best[:wanted]]] = True
                static_S, wanted = same_n.nonzero()[:, 0], round(int(same_n.sum()) * share)
                if not wanted:
                    continue
                mean_SD = x_FnD[first : last + 1, static_S].mean(dim=0)
                centres_C, merged_CD = self._merged(mean_SD, wanted)
                here, places_C = frames[first], static_S[centres_C]
                kept_IM[here, places_C] = changed_IM[here, places_C] = True
                states_IMD[here, places_C] = merged_CD
                order_IM[here, places_C] = places_C
        kept_IM |= _of_empty_frames(kept_IM, attention_IM, inputs.valid)
        return TokenSelection(kept_IM, changed_IM, states_IMD, order_IM)

    def _merged(self, x_SD: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Cluster tokens; return the positions of the centres and their merged states."""
        every = torch.ones(1, len(x_SD), dtype=torch.bool, device=x_SD.device)
        count_I = torch.tensor([count], device=x_SD.device)
        centre_IM, owner_IM, _ = cluster_by_density(x_SD[None], every, count_I, self.neighbours)
        centres_C, owner_S = centre_IM[0].nonzero()[:, 0], owner_IM[0]
        merged_CD = x_SD[centres_C].clone()
        for row, place in enumerate(centres_C.tolist()):
            joined_S = (owner_S == place) & ~centre_IM[0]
            if bool(joined_S.any()):
                rest_D = x_SD[joined_S].mean(dim=0)
                merged_CD[row] = self.centre * merged_CD[row] + (1 - self.centre) * rest_D
        return centres_C, merged_CD

    def _fold(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        """Keep the tokens, of all frames, to which the last one attends; fold in the others."""
        attention_IM = inputs.attention(inputs.last_row())[:, 0]
        kept_IM, states_IMD = torch.zeros_like(inputs.valid), inputs.states_IMD.clone()
        samples_I = inputs.frames.sample_I
        prompts = [inputs.valid & (samples_I == s)[:, None] for s in samples_I.unique().tolist()]
        for own_IM in prompts:
            attention_V = attention_IM[own_IM]
            wanted = round(len(attention_V) * (1 - self.drop))
            kept_V = torch.zeros_like(attention_V, dtype=torch.bool)
            kept_V[attention_V.argsort(descending=True, stable=True)[:wanted]] = True
            kept_IM[own_IM] = kept_V
        kept_IM |= _of_empty_frames(kept_IM, attention_IM, inputs.valid)
        for own_IM in prompts:
            states_IMD[own_IM] = folded(inputs.states_IMD[own_IM], kept_IM[own_IM])
        return TokenSelection(kept_IM, kept_IM, states_IMD)

    def _macs(self, sizes: SelectionSizes) -> float:
        """Return the multiply-adds of the tower's attention, and an upper bound of distances."""
        frames = len(sizes.counts)
        windows = min(frames // 2, frames - sizes.samples)
        distances = windows * max(sizes.counts) ** 2 * sizes.width
        return cast(TowerSizes, sizes.tower).reading_macs + distances


def static_windows(same_Gn: Tensor) -> list[tuple[int, int, Tensor]]:
    """Divide frames into windows in which most tokens repeat: (first, last, static positions [n]).

    `same_Gn` marks the positions that do not change from each frame to the next. A window from
    frame a to frame b saves b - a tokens per static position. The windows maximise the total
    saving, by dynamic programming over the last frame; among equal totals the shortest last window
    is chosen. A window of one frame has no static position.
    """
    frames, none_n = len(same_Gn) + 1, same_Gn.new_zeros(same_Gn.shape[1])
    best, start = [0] * (frames + 1), list(range(frames))
    for last in range(frames):
        best[last + 1] = best[last]
        same_n = torch.ones_like(none_n)
        for first in range(last - 1, -1, -1):
            same_n = same_n & same_Gn[first]
            saved = best[first] + (last - first) * int(same_n.sum())
            if saved > best[last + 1]:
                best[last + 1], start[last] = saved, first
    windows, last = [], frames - 1
    while last >= 0:
        first = start[last]
        same_n = same_Gn[first:last].all(dim=0) if first < last else none_n
        windows.append((first, last, same_n))
        last = first - 1
    return windows[::-1]


def folded(x_VD: Tensor, kept_V: Tensor) -> Tensor:
    """Fold each removed token into the kept one of highest cosine; return all tokens, [V, D].

    In order of position, the kept token becomes the mean of its current value and the removed one.
    Cosines are those of the original tokens.
    """
    removed_RD, kept_KD = x_VD[~kept_V].float(), x_VD[kept_V].float()
    unit_RD, unit_KD = (functional.normalize(x, dim=-1) for x in (removed_RD, kept_KD))
    owner_R = (unit_RD @ unit_KD.T).argmax(dim=1)
    # Each later token of the same owner halves the weight of the earlier ones.
    later_RR = (owner_R[:, None] == owner_R[None, :]).triu(diagonal=1)
    weight_R = 0.5 ** (later_RR.sum(dim=1) + 1).float()
    halvings_K = owner_R.bincount(minlength=len(kept_KD))
    folded_KD = kept_KD * 0.5 ** halvings_K[:, None].float()
    folded_KD.index_add_(0, owner_R, removed_RD * weight_R[:, None])
    x_VD = x_VD.clone()
    x_VD[kept_V] = folded_KD.to(x_VD.dtype)
    return x_VD


def _folding_macs(sizes: SelectionSizes) -> float:
    """Return the MACs of the last token's attention and of the cosines, for prompts of one size."""
    kept, removed = sum(sizes.kept), sum(sizes.counts) - sum(sizes.kept)
    return sizes.row_macs + kept * removed * sizes.width / sizes.samples


def _of_empty_frames(kept_IM: Tensor, attention_IM: Tensor, valid_IM: Tensor) -> Tensor:
    """Mark the most attended token of every frame that would keep none."""
    # Later methods rely on at least one token per frame.
    return top_tokens(attention_IM, valid_IM, (~kept_IM.any(dim=1)).long())
