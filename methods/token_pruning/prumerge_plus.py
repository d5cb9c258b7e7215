"""PruMerge and PruMerge+ (ICCV 2025): outliers of the tower's attention absorb their neighbours.

Shapes: I frames, M tokens of a frame, D width, E width of keys.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from bench.method import Context
from bench.models.vlm.vision_tower import LayerRequest, TowerSizes
from methods.token_pruning.base import (
    Amount,
    BeforeDecoder,
    Variant,
    evenly_spaced,
    reproject,
    top_tokens,
)
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import SelectionSizes, TokenPruningStep
from methods.visual_engine.settings import Quota

# The release reads the last layer, whose output LLaVA discards.
LAST_LAYER = LayerRequest(-1, one_head=True)


class PruMergePlus(BeforeDecoder):
    """Keep the outliers of the class token's attention, and evenly spaced tokens up to `keep`.

    Outliers get more attention than Q3 + 1.5 (Q3 - Q1). Before the projector, each kept token
    absorbs the `neighbours` other tokens with the most similar keys, weighted by attention.

    With `keep=adaptive`, as in the release, the image determines the number of kept tokens, about a
    quarter: if t of n tokens are outliers, every s-th token except the last, with s = ⌊⌊n / t⌋ /
    3⌋, is added unless it is an outlier. A fixed `keep` makes costs known in advance.

    With `variant=paper`, attention, averaged over heads, and keys are those of the layer whose
    output is projected. In towers without a class token (Qwen), the attention of a token is what it
    receives from all patches on average. With `variant=release`, both are those of the tower's last
    layer, as one head of full width, and the last of the `keep` tokens is the sum of all removed
    ones weighted by attention, at the position of the last of them. With `positions=renumbered`,
    outliers come first, by decreasing attention, then the added tokens, then that sum.
    """

    label: ClassVar[str] = "prumerge_plus"
    reads_tower: ClassVar[bool] = True

    # Wider than the type in the base class, which mypy rejects.
    keep: Amount | Literal["adaptive"] = 0.25  # type: ignore[assignment]
    variant: Variant = "paper"
    neighbours: int = Field(default=32, ge=0)

    def _tower_layers(self) -> tuple[LayerRequest, ...]:
        return (LAST_LAYER,) if self.variant == "release" else ()

    def _steps(self, depth: int, context: Context) -> list[TokenPruningStep]:
        (step,) = super()._steps(depth, context)
        return [replace(step, adaptive=self.keep == "adaptive")]

    def _quota(self) -> Quota:
        return Quota.of("all" if self.keep == "adaptive" else self.keep)

    def _selected(
        self, attention_IM: Tensor, valid_IM: Tensor, keep_I: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mark the outliers, and all kept tokens without the sum of removed ones, [I, M]."""
        outliers_I = count_outliers(attention_IM, valid_IM)
        if self.keep == "adaptive":
            salient_IM = top_tokens(attention_IM, valid_IM, outliers_I)
            return salient_IM, salient_IM | self._sampled(valid_IM, outliers_I)
        # If there are more outliers than `keep`, those with the most attention are kept.
        salient_I = torch.minimum(self._salient(outliers_I, keep_I), keep_I)
        salient_IM = top_tokens(attention_IM, valid_IM, salient_I)
        return salient_IM, salient_IM | evenly_spaced(valid_IM & ~salient_IM, keep_I - salient_I)

    def _sampled(self, valid_IM: Tensor, outliers_I: Tensor) -> Tensor:
        """Mark the tokens that `keep=adaptive` adds to the outliers, [I, M]."""
        count_I = valid_IM.sum(dim=1)
        step_I1 = (count_I // outliers_I // 3).clamp(min=1)[:, None]
        place_IM = torch.arange(valid_IM.shape[1], device=valid_IM.device)
        return (place_IM % step_I1 == 0) & (place_IM < count_I[:, None] - 1)

    def _salient(self, outliers_I: Tensor, keep_I: Tensor) -> Tensor:
        """Return the number of tokens that are chosen by attention alone, [I]."""
        return outliers_I

    def _choose(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        if self.variant == "release":
            return self._choose_as_released(inputs, keep_I)
        tower, valid_IM = inputs.require_tower_output(), inputs.valid
        _, kept_IM = self._selected(tower.received_V, valid_IM, keep_I)
        if not self.neighbours:
            return TokenSelection(kept_IM)
        keys_IME = tower.keys_VHd.flatten(2)
        merged_IMF = absorb_neighbours(
            tower.features_VF, keys_IME, tower.received_V, valid_IM, self.neighbours
        )
        return TokenSelection(kept_IM, kept_IM, reproject(inputs, tower, kept_IM, merged_IMF))

    def _choose_as_released(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        tower, valid_IM = inputs.require_tower_output(), inputs.valid
        reading = tower.layers[LAST_LAYER]
        attention_IM, features_IMF = reading.received_V, tower.features_VF
        salient_IM, chosen_IM = self._selected(attention_IM, valid_IM, keep_I - 1)
        merged_IMF = absorb_neighbours(
            features_IMF, reading.keys_VD, attention_IM, valid_IM, self.neighbours
        )
        gone_IM = valid_IM & ~chosen_IM
        weight_IM = torch.where(gone_IM, attention_IM, 0).to(features_IMF.dtype)
        rest_IF = torch.einsum("im,imf->if", weight_IM, features_IMF)
        last_IM = gone_IM & (gone_IM.flip(1).cumsum(dim=1).flip(1) == 1)
        merged_IMF = torch.where(last_IM[..., None], rest_IF[:, None], merged_IMF)
        kept_IM = chosen_IM | last_IM
        # Attention is below 1, so outliers sort before all positions in the image.
        place_IM = torch.arange(valid_IM.shape[1], device=valid_IM.device).float()
        order_IM = torch.where(salient_IM, -attention_IM.float(), place_IM)
        order_IM = order_IM.masked_fill(last_IM, torch.inf)
        return TokenSelection(
            kept_IM, kept_IM, reproject(inputs, tower, kept_IM, merged_IMF), order_IM
        )

    def _macs(self, sizes: SelectionSizes) -> float:
        tower = cast(TowerSizes, sizes.tower)
        reading = tower.reading_macs + sum(tower.layers[each] for each in self._tower_layers())
        if not self.neighbours and self.variant == "paper":
            return reading
        merging = sizes.pairs * (tower.keys + tower.features)
        if self.variant == "release":
            merging += len(sizes.counts) * max(sizes.counts) * tower.features
        return reading + merging + sum(sizes.kept) * tower.project


class PruMerge(PruMergePlus):
    """Keep only the outliers of the class token's attention, about 5 % of the tokens.

    With a number or share for `keep`, the tokens with the most attention are kept. Everything else
    is as in `PruMergePlus`.
    """

    label: ClassVar[str] = "prumerge"

    keep: Amount | Literal["adaptive"] = "adaptive"

    def _sampled(self, valid_IM: Tensor, outliers_I: Tensor) -> Tensor:
        return torch.zeros_like(valid_IM)

    def _salient(self, outliers_I: Tensor, keep_I: Tensor) -> Tensor:
        return keep_I


def count_outliers(attention_IM: Tensor, valid_IM: Tensor) -> Tensor:
    """Count the tokens of each frame with attention above Q3 + 1.5 (Q3 - Q1), at least 1, [I]."""
    # Padding becomes NaN so that `nanquantile` takes quartiles over the real tokens only.
    known_IM = attention_IM.float().masked_fill(~valid_IM, torch.nan)
    quarters = torch.tensor([0.25, 0.75], device=known_IM.device)
    low_I, high_I = torch.nanquantile(known_IM, quarters, dim=1)
    bound_I = high_I + 1.5 * (high_I - low_I)
    above_IM: Tensor = (attention_IM > bound_I[:, None]) & valid_IM
    return above_IM.sum(dim=1).clamp(min=1)


def absorb_neighbours(
    x_IMD: Tensor, keys_IME: Tensor, attention_IM: Tensor, valid_IM: Tensor, neighbours: int
) -> Tensor:
    """Add to every token its nearest neighbours, weighted by attention, [I, M, D].

    These are the `neighbours` other tokens whose keys have the highest cosine with its own.
    """
    unit_IME = functional.normalize(keys_IME.float(), dim=-1)
    similar_IMM = unit_IME @ unit_IME.transpose(1, 2)
    itself_MM = torch.eye(x_IMD.shape[1], dtype=torch.bool, device=x_IMD.device)
    possible_IMM = valid_IM[:, None, :] & ~itself_MM
    similar_IMM = similar_IMM.masked_fill(~possible_IMM, -torch.inf)
    rank_IMM = similar_IMM.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
    near_IMM = (rank_IMM < neighbours) & possible_IMM
    weight_IMM = near_IMM * attention_IM[:, None, :]
    return x_IMD + weight_IMM.to(x_IMD.dtype) @ x_IMD
