"""MoE-Slimming (arXiv 2606.18304): remove channels of routed experts, by budgets of coverage.

Channels are ranked within their expert by how active they are. How many of them stay is decided by
`budgets`: layers whose routed experts matter more to their output cover more of their activity, and
so do experts whose removal is estimated to cost more. The published rows follow this by training
with LoRA, which is no part of the method here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bench.method import Context, MethodReport
from bench.models.model import Model
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import MoEBlock
from bench.ui import Progress
from methods.baselines.moe_slimming.attribution import Attribution, Order
from methods.baselines.moe_slimming.budgets import (
    expert_weights,
    keep_by_coverage,
    layer_weights,
    rounded_widths,
)
from methods.moe.calibration import CalibratedPruning, require_finite, walk_blocks
from methods.moe.micro_experts import SHARED, expert_spans
from methods.moe.pruning import (
    MicroExpertPruning,
    refuse_offloaded,
    require_calibration,
    require_routed_room,
)
from methods.moe.ranking import energy_share, lowest_of_each


class MoESlimming(MicroExpertPruning, CalibratedPruning):
    """Remove the least active channels of routed experts, as many as coverage leaves to each.

    Widths are multiples of `multiple` (1: any width), zero or at least `least`. `order` is that of
    the estimate of an expert's cost. `batch` rows are one step of the moving averages, so unlike
    elsewhere it changes the scores. The ratio counts shared experts as well, so that methods
    compare at equal size; the published one counts routed channels only.
    """

    state: Literal["zeroed", "removed"] = "removed"
    order: Order = "first"
    multiple: int = Field(default=1, ge=1)
    least: int = Field(default=4, ge=0)
    batch: int = Field(default=2, ge=1)

    def check(self, structure: ModelStructure) -> None:
        """Also refuse a ratio that routed experts alone cannot reach."""
        super().check(structure)
        require_routed_room(self.blocks(structure), self.budgets(structure), self.ratio)

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Measure the unpruned model in one pass, divide the budget, and remove."""
        calibration, structure = require_calibration(context), model.structure
        blocks = structure.micro_expert_blocks
        refuse_offloaded(blocks)
        found = dict(self._observe(model, calibration.tokens, context.progress))
        widths = self.kept_widths(structure, found)
        layers = []
        for block, kept in zip(blocks, widths, strict=True):
            score_N, spans = found[block].channel_scores(), expert_spans(block)
            wanted = {SHARED: block.d_shared, **dict(enumerate(kept))}
            losses = [place.stop - place.start - wanted[expert] for expert, place in spans]
            indices = lowest_of_each(score_N, [place for _, place in spans], losses)
            share = energy_share(score_N, indices)
            entry = self.remove_micro_experts(block, indices)
            layers.append(
                entry
                | {
                    "scores": found[block].expert_scores().tolist(),
                    "layer_loss": found[block].layer_loss(),
                    "removed_score_share": share,
                }
            )
        return self.build_report(
            model,
            structure,
            layers,
            order=self.order,
            calibration=calibration.fingerprint,
            tokens=calibration.tokens.numel(),
        )

    def kept_widths(
        self, structure: ModelStructure, found: dict[MoEBlock, Attribution]
    ) -> list[list[int]]:
        """Return how many channels every routed expert keeps, by block."""
        routed = [_by_expert(block, found[block].channel_scores()) for block in found]
        loss_L = torch.tensor([scores.layer_loss() for scores in found.values()])
        keep = sum(sum(block.widths) for block in found) - sum(self.budgets(structure))
        by_layer = keep_by_coverage(
            [torch.cat(scores) for scores in routed], layer_weights(loss_L), keep
        )
        widths = [
            keep_by_coverage(scores, expert_weights(found[block].expert_scores()), count)
            for block, scores, count in zip(found, routed, by_layer, strict=True)
        ]
        return rounded_widths(widths, [block.widths for block in found], self.multiple, self.least)

    def _observe(
        self, model: Model, tokens_BL: Tensor, progress: Progress
    ) -> Iterator[tuple[MoEBlock, Attribution]]:
        """Yield every block with its scores, from the unpruned model."""
        decoder_layers = model.structure.layers
        with ExitStack() as stack:

            def observer(block: MoEBlock) -> Attribution:
                found = Attribution(block, self.order)

                def after(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
                    # Some layers return more than hidden states.
                    h_BLD = output[0] if isinstance(output, tuple) else output
                    found.layer_output(h_BLD.flatten(0, -2))

                layer = decoder_layers[block.layer]
                stack.callback(layer.register_forward_hook(after).remove)
                return found

            for block, found in walk_blocks(
                model, tokens_BL, observer, self.walk_options(), progress
            ):
                require_finite(block, found.channel_scores(), found.expert_scores())
                yield block, found


def _by_expert(block: MoEBlock, score_N: Tensor) -> list[Tensor]:
    """Return the scores of each routed expert, on the CPU."""
    return [score_N[place].cpu() for expert, place in expert_spans(block) if expert != SHARED]
