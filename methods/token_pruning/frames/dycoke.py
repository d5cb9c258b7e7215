"""DyCoke (Tao et al., CVPR 2025): what repeats leaves; generated tokens read a part of the rest.

Shapes: I frames, M tokens of a frame, in raster order, n of one frame.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from bench.method import Context
from bench.models.model import Model
from bench.models.structure.model_structure import ModelStructure
from methods.token_pruning.base import TokenPruning, Variant, frames_of_samples
from methods.visual_engine.decoder import VisualEngine
from methods.visual_engine.plan import VisualPlan
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import SelectionSizes, TokenPruningStep
from methods.visual_engine.settings import DecodePruning, Quota

# Frames of one group: the first stays whole, and each later one is compared with an earlier one.
GROUP = 4
COMPARED = {1: 0, 3: 2, 2: 0}


class DyCoke(TokenPruning):
    """Keep of later frames what differs most from an earlier one; while generating, read less.

    Before the decoder: the frames of a prompt (images of one size in a row, or time steps of a
    video) make groups of four. The first of a group stays whole; the second is compared with it,
    the fourth with the third, and the third with the first, place by place. Of a compared frame a
    share `repeated` (K) leaves: the places of highest cosine (the paper's token temporal merging).
    An image alone is left unchanged.

    At each generated token: from layer `decode_layer` (L) on it reads only the visual tokens of the
    prompt to which it attends most in the layer before, softmax over all keys and mean over heads.
    A share `decode_ratio` (P) is left out; 0 leaves out nothing. They stay in the cache, and the
    next token may read them. Where this attention has a cosine of at least `decode_similarity` with
    that of the token before, nothing new is chosen. In a batch or a beam search every sequence
    chooses for itself; calls of several tokens (prompts, later turns, candidates of assisted
    generation) read everything. L, P and the similarity are the release's, P as its readme has it
    (its evaluation's own default is 0.8).

    `variant=paper`: all groups, the last one as far as it goes. `variant=release`: the third frame
    of the last four stays whole, and with `positions=renumbered` the tokens of a compared frame
    come in order of rising similarity, not of place (github.com/KD-TAO/DyCoke, dd74634; it also
    loses a last frame without partner, which stays here). A token for which nothing new is chosen
    reads with `paper` what the token before it read, with `release` everything.
    """

    label: ClassVar[str] = "dycoke"

    variant: Variant = "paper"
    repeated: float = Field(default=0.7, ge=0, lt=1)
    decode_ratio: float = Field(default=0.7, ge=0, lt=1)
    decode_layer: int = Field(default=3, ge=1)
    decode_similarity: float = Field(default=0.9, ge=0)

    def check(self, structure: ModelStructure) -> None:
        """Also refuse a decoder without that layer."""
        super().check(structure)
        self._prune_decode(VisualPlan.dense(len(structure.layers)))

    def configure(self, engine: VisualEngine, model: Model, context: Context) -> dict[str, object]:
        """Also let generated tokens choose; report their settings."""
        details = super().configure(engine, model, context)
        self._prune_decode(engine.plan)
        return details | {"decode": engine.plan.decode and asdict(engine.plan.decode)}

    def _prune_decode(self, plan: VisualPlan) -> None:
        if self.decode_ratio:
            plan.prune_decode(
                DecodePruning(
                    self.label,
                    self.decode_layer,
                    drop=self.decode_ratio,
                    similarity=self.decode_similarity,
                    repeats=not self._is_released,
                )
            )

    def _steps(self, depth: int, context: Context) -> list[TokenPruningStep]:
        # Frames of one prompt keep different numbers of tokens, so there is no quota for all.
        every = Quota.of("all")
        return [
            TokenPruningStep(self.label, 0, every, self._choose, macs=_elementwise, adaptive=True)
        ]

    def _choose(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        kept_IM = inputs.valid.clone()
        place_M = torch.arange(kept_IM.shape[1], device=kept_IM.device)
        order_IM = place_M.float().repeat(len(kept_IM), 1)
        for frames in frames_of_samples(inputs, self.label):
            for later, earlier in compared_frames(len(frames), last_whole=self._is_released):
                this, other = frames[later], frames[earlier]
                count = inputs.frames.counts[this]
                similar_n = functional.cosine_similarity(
                    inputs.states_IMD[this, :count].float(),
                    inputs.states_IMD[other, :count].float(),
                    dim=-1,
                )
                staying = similar_n.argsort(stable=True)[: max(1, int((1 - self.repeated) * count))]
                kept_IM[this] = False
                kept_IM[this, staying] = True
                order_IM[this, :count] = similar_n
        return TokenSelection(kept_IM, order_IM=order_IM if self._is_released else None)

    @property
    def _is_released(self) -> bool:
        return self.variant == "release"


def compared_frames(count: int, *, last_whole: bool) -> list[tuple[int, int]]:
    """List the frames of a prompt that lose tokens, each with the frame it is compared with.

    With `last_whole`, the third frame of a group is compared only if a fifth follows.
    """
    pairs = []
    for first in range(0, count, GROUP):
        for later, earlier in COMPARED.items():
            if later == 2 and last_whole and first + GROUP >= count:
                continue
            if first + later < count:
                pairs.append((first + later, first + earlier))
    return pairs


def _elementwise(sizes: SelectionSizes) -> float:
    """Return no multiply-adds of matrices: frames are compared element by element."""
    return 0.0
