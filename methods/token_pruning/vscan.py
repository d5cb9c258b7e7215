"""VScan (Zhang et al., TMLR 2026): local and global scans of the tower, then by the question.

Shapes: I frames, M tokens of a frame, in raster order.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from bench.method import Context
from bench.models.vlm.vision_tower import LayerRequest, TowerSizes
from methods.token_pruning.base import Amount, TokenPruning, frame_sides, top_tokens
from methods.token_pruning.pyramid_drop import attended_in_next_layer, next_layer_macs
from methods.token_pruning.visionzip import merge_into_targets
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import SelectionSizes, TokenPruningStep
from methods.visual_engine.settings import Quota


class VScan(TokenPruning):
    """Keep `keep` tokens of a frame before the decoder, and `then` of them after some layers.

    Before the decoder, half of the tokens are local: in each of `windows` x `windows` equal windows
    of the image, those to which the class token attends most in an early layer, at the fraction
    `local_layer` of the tower's depth (the sixth of 24). The other half are global: those to which
    it attends most in the layer that is projected. After the projector, every removed token joins
    the kept one of highest cosine, which becomes the mean of its group. At the fraction `layer` of
    the decoder's depth, `then` tokens are kept: those to which the last prompt token would attend
    most in the next layer.

    The defaults are those of the release for 64 of 576 tokens on average, 96 and then 32 (Sec. 4;
    github.com/Tencent/SelfEvolvingAgent, VScan, a82450e). If the local half is not a multiple of
    the number of windows, the release keeps fewer tokens; here more global ones are kept instead.
    """

    label: ClassVar[str] = "vscan"
    reads_tower: ClassVar[bool] = True

    keep: Amount = 1 / 6
    then: Amount = 1 / 18
    windows: int = Field(default=4, ge=1)
    local_layer: float = Field(default=6 / 24, gt=0, le=1)
    layer: float = Field(default=0.5, gt=0, lt=1)

    def _tower_layers(self) -> tuple[LayerRequest, ...]:
        return (LayerRequest(self.local_layer),)

    def _steps(self, depth: int, context: Context) -> list[TokenPruningStep]:
        return [
            TokenPruningStep(
                self.label, 0, Quota.of(self.keep), self._scan, reads_tower=True, macs=self._macs
            ),
            TokenPruningStep(
                self.label,
                max(1, round(self.layer * depth)),
                Quota.of(self.then),
                attended_in_next_layer,
                macs=next_layer_macs,
            ),
        ]

    def _scan(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        tower, valid_IM = inputs.require_tower_output(), inputs.valid
        early_IM = tower.layers[self._tower_layers()[0]].received_V
        window_IM = windows_of(inputs, self.windows, self.label)
        local_IM = best_of_windows(early_IM, window_IM, valid_IM, keep_I // 2, self.windows**2)
        global_IM = top_tokens(tower.received_V, valid_IM & ~local_IM, keep_I - local_IM.sum(dim=1))
        kept_IM, states_IMD = local_IM | global_IM, inputs.states_IMD
        merged_IMD = merge_into_targets(states_IMD, states_IMD, kept_IM, valid_IM & ~kept_IM)
        return TokenSelection(kept_IM, kept_IM, merged_IMD)

    def _macs(self, sizes: SelectionSizes) -> float:
        tower = cast(TowerSizes, sizes.tower)
        reading = tower.reading_macs + sum(tower.layers[each] for each in self._tower_layers())
        return reading + sizes.pairs * sizes.width


def windows_of(inputs: SelectionInputs, windows: int, name: str) -> Tensor:
    """Return the window number of each token, [I, M], numbered row by row.

    Raises:
        UserError: an earlier step has removed tokens.
    """
    rows_I, columns_I = frame_sides(inputs, name)
    row_IM = inputs.cells.row_N * windows // rows_I[:, None]
    column_IM = inputs.cells.column_N * windows // columns_I[:, None]
    return row_IM * windows + column_IM


def best_of_windows(
    score_IM: Tensor, window_IM: Tensor, valid_IM: Tensor, count_I: Tensor, windows: int
) -> Tensor:
    """Mark the ⌊`count` / `windows`⌋ tokens of highest score in each window, bool [I, M]."""
    found_IM = torch.zeros_like(valid_IM)
    for window in range(windows):
        found_IM |= top_tokens(score_IM, valid_IM & (window_IM == window), count_I // windows)
    return found_IM
