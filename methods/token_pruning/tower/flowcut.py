"""FlowCut (Tong et al., NeurIPS 2025): remove patches inside the vision tower, layer by layer.

Shapes: I images, M patches of an image left in a layer, S rows (the class token and patches), H
heads, d a head's width.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor

from bench.method import Context
from bench.models.model import Model
from bench.models.vlm.tower_pass import TowerRows
from bench.models.vlm.vision_tower import TowerSizes
from methods.token_pruning.base import BeforeDecoder, require_whole_images
from methods.visual_engine.decoder import VisualEngine
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import SelectionSizes


class FlowCut(BeforeDecoder):
    """Remove patches after every second layer of the tower, until `keep` are left to be projected.

    The score of a patch in a layer is its share of the class token's attention, plus its share of
    the softmax of value products with the class token, times the L1 norm of its value. It is
    averaged with the score of earlier layers, half and half. The last cut is before the layer whose
    output is projected, with further cuts two, four, ... layers before it. The less even the class
    token's attention, the more patches are removed at once (Sec. 3;
    github.com/TungChintao/FlowCut, a2ecd24, for LLaVA-1.5). If a call has several images, the
    release removes the same number of patches from each, that of the image that loses most; here
    every image is treated separately.
    """

    label: ClassVar[str] = "flowcut"
    reads_tower: ClassVar[bool] = True

    def configure(self, engine: VisualEngine, model: Model, context: Context) -> dict[str, object]:
        """Also remove patches inside the tower."""
        engine.prune_tower(self.label, self._rank)
        return super().configure(engine, model, context)

    def _rank(self, rows: TowerRows, before_IM: Tensor | None) -> tuple[Tensor, Tensor]:
        attention_IM = class_attention(rows)
        score_IM = flow_scores(rows, attention_IM)
        if before_IM is not None:
            score_IM = (before_IM + score_IM) / 2
        count_I = rows.valid_IM.sum(dim=1)
        if rows.until % 2:
            return score_IM, count_I
        target_I = count_I.clamp(max=self._quota().kept(rows.patches, rows.patches))
        leaving_I = patches_to_cut(attention_IM, count_I, target_I, rows.until)
        return score_IM, (count_I - leaving_I).clamp(min=target_I)

    def _choose(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        require_whole_images(inputs, self.label)
        kept_IM = cast(Tensor, inputs.require_tower_output().kept_V)
        return TokenSelection(kept_IM & inputs.valid)

    def _macs(self, sizes: SelectionSizes) -> float:
        """Return the multiply-adds of the class token's products with keys and values per layer."""
        tower = cast(TowerSizes, sizes.tower)
        return 2.0 * len(sizes.counts) * sum(tower.rows) * tower.keys


def class_attention(rows: TowerRows) -> Tensor:
    """Return the class token's attention to each patch, mean over heads, [I, M]; padding gets 0."""
    return _head_mean_softmax(rows, rows.query_IHd, rows.keys_ISHd)


def flow_scores(rows: TowerRows, attention_IM: Tensor) -> Tensor:
    """Return the importance of each patch in one layer, [I, M].

    Products of values are not scaled, and their softmax includes the class token; both shares are
    among the patches alone. The norm is that of the value averaged over heads.
    """
    common_IM = _head_mean_softmax(rows, rows.values_ISHd[:, 0], rows.values_ISHd)
    norm_IM = rows.values_ISHd[:, 1:].mean(dim=2).abs().sum(dim=-1)
    return (_shares(attention_IM) + _shares(common_IM)) * norm_IM


def patches_to_cut(attention_IM: Tensor, count_I: Tensor, target_I: Tensor, until: int) -> Tensor:
    """Return how many patches to remove after a layer, `until` layers before the last cut, [I].

    Of N patches with target T it is (N - T) / √until · (1 - (H / log N)²), rounded, where H is the
    entropy of the class token's attention to them; at the last cut it is N - T.
    """
    if not until:
        return count_I - target_I
    entropy_I: Tensor = torch.special.entr(_shares(attention_IM)).sum(dim=1)
    # An image of one patch loses nothing, and its largest entropy is 0.
    evenness_I = entropy_I / count_I.clamp(min=2).log()
    leaving_I: Tensor = (count_I - target_I) / until**0.5 * (1 - evenness_I**2)
    return leaving_I.round().long()


def _head_mean_softmax(rows: TowerRows, query_IHd: Tensor, keys_ISHd: Tensor) -> Tensor:
    """Return the softmax of one row's products, averaged over heads, for patches only, [I, M]."""
    products_IHS = torch.einsum("ihd,ishd->ihs", query_IHd, keys_ISHd)
    hidden_IM = ~rows.valid_IM
    hidden_IS = torch.cat([torch.zeros_like(hidden_IM[:, :1]), hidden_IM], dim=1)
    weight_IHS = products_IHS.masked_fill(hidden_IS[:, None], -torch.inf).softmax(dim=-1)
    return weight_IHS.mean(dim=1)[:, 1:]


def _shares(weight_IM: Tensor) -> Tensor:
    return weight_IM / weight_IM.sum(dim=1, keepdim=True)
