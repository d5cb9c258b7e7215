"""HiPrune (Liu et al., ACL 2026): objects by a middle layer of the tower, registers by a deep one.

Shapes: I frames, M tokens of a frame, in raster order.
"""

from __future__ import annotations

from typing import ClassVar, cast

from pydantic import Field
from torch import Tensor

from bench.models.vlm.vision_tower import LayerRequest, TowerSizes
from methods.token_pruning.base import BeforeDecoder, Variant, frame_sides, top_tokens
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import SelectionSizes

DEEP_LAYER = LayerRequest("projected", queries="all")


class HiPrune(BeforeDecoder):
    """Keep anchors, their neighbours, and registers up to `keep`.

    The attention of a token is what it receives on average from the class token and all patches.
    Anchors are the `alpha` · keep / 5 tokens, rounded, that receive most in the layer at the
    fraction `object_layer` of the tower's depth (the ninth of 24); the four neighbours of each
    anchor are kept as well. Registers are the tokens that receive most in the layer that is
    projected.

    Neighbours are one position before or after in the sequence, or one row above or below; at the
    end of a row, the next one is the first token of the next row. A position outside the image is
    ignored with `variant=paper`, and replaced by the first or last token with `variant=release`
    (Sec. 3; github.com/Danielement321/HiPrune, 6e83a12).
    """

    label: ClassVar[str] = "hiprune"
    reads_tower: ClassVar[bool] = True

    variant: Variant = "paper"
    alpha: float = Field(default=0.1, ge=0, le=1)
    object_layer: float = Field(default=9 / 24, gt=0, le=1)

    def _tower_layers(self) -> tuple[LayerRequest, ...]:
        return (LayerRequest(self.object_layer, queries="all"), DEEP_LAYER)

    def _choose(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        layers = inputs.require_tower_output().layers
        middle, deep = (layers[request].received_V for request in self._tower_layers())
        anchors_I = (keep_I * self.alpha / 5).round().long()
        anchor_IM = top_tokens(middle, inputs.valid, anchors_I)
        _, columns_I = frame_sides(inputs, self.label)
        clamp = self.variant == "release"
        around_IM = with_neighbours(anchor_IM, inputs.valid, columns_I.tolist(), clamp=clamp)
        # Anchors and neighbours are at most a share `alpha` of `keep`, except for rounding.
        around_IM = top_tokens(deep, around_IM, keep_I)
        registers_I = keep_I - around_IM.sum(dim=1)
        return TokenSelection(around_IM | top_tokens(deep, inputs.valid & ~around_IM, registers_I))

    def _macs(self, sizes: SelectionSizes) -> float:
        tower = cast(TowerSizes, sizes.tower)
        return tower.reading_macs + sum(tower.layers[each] for each in self._tower_layers())


def with_neighbours(
    marked_IM: Tensor, valid_IM: Tensor, widths: list[int], *, clamp: bool
) -> Tensor:
    """Also mark the tokens one position and one row (of `widths` tokens) away, bool [I, M].

    With `clamp`, positions outside the frame are replaced by the first or last token.
    """
    found_IM = marked_IM.clone()
    counts = valid_IM.sum(dim=1).tolist()
    for frame, (width, count) in enumerate(zip(widths, counts, strict=True)):
        place_A = marked_IM[frame].nonzero()[:, 0]
        for step in (-1, 1, -width, width):
            beside_A = place_A + step
            if clamp:
                beside_A = beside_A.clamp(0, count - 1)
            found_IM[frame, beside_A[(beside_A >= 0) & (beside_A < count)]] = True
    return found_IM
