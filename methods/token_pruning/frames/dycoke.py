"""DyCoke (Tao et al., CVPR 2025): remove repeated tokens, and limit what generated tokens read.

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

# Number of frames in a group.
GROUP = 4
COMPARED = {1: 0, 3: 2, 2: 0}


class DyCoke(TokenPruning):
    """Remove the tokens of later frames that repeat an earlier one; generated tokens read less.

    Before the decoder, the frames of a prompt (images of equal size, or time steps of a video) are
    divided into groups of four. The first frame of a group is kept whole. The second is compared
    with the first, the fourth with the third, and the third with the first, position by position.
    Of a compared frame, the share `repeated` (K) of the tokens with the highest cosine is removed
    (the paper's token temporal merging). A single image is left unchanged.

    From layer `decode_layer` (L) on, each generated token leaves out the share `decode_ratio` (P)
    of the prompt's visual tokens to which it attends least in the layer before (softmax over all
    keys, mean over heads). They stay in the cache, and later tokens may read them. If this
    attention has a cosine of at least `decode_similarity` with that of the preceding token, no new
    choice is made. Every sequence of a batch or beam search has its own choice. Calls with several
    tokens (prompts, later turns, candidates of assisted generation) read everything. L, P and the
    similarity are those of the release, P according to its readme (its evaluation uses 0.8).

    `variant=paper` compares the frames of all groups, including an incomplete last one. With
    `variant=release` (github.com/KD-TAO/DyCoke, dd74634), the third of the last four frames is kept
    whole, and with `positions=renumbered` the tokens of a compared frame are sorted by increasing
    similarity; a last frame without a partner, which the release loses, is kept here. If no new
    choice is made, a token reads the same tokens as the preceding one with `paper`, and all tokens
    with `release`.
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
        # Frames of a prompt keep different numbers of tokens, so no quota applies to all of them.
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

    With `last_whole`, the third frame of a group is compared only if a fifth frame follows.
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
    """Return 0, because frames are compared element by element, without any matmul."""
    return 0.0
