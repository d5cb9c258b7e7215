"""PyramidDrop (Xing et al., CVPR 2025): a share of the tokens is removed after every stage."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from bench.errors import UserError
from bench.method import Context
from methods.token_pruning.base import TokenPruning, Variant, top_tokens
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import SelectionSizes, TokenPruningStep
from methods.visual_engine.settings import Quota


class PyramidDrop(TokenPruning):
    """Divide the decoder into equal `stages` and keep a share `ratio` (λ) of the tokens after each.

    `variant=paper` ranks tokens by their product q · k with the last prompt token in the last layer
    of the stage, averaged over heads. `variant=release` ranks them by the attention of that token
    in the next layer if nothing were removed: with q and k of that layer, the softmax over all
    keys, and the mean over heads. The shares λ, λ², λ³ refer to the frame's original tokens. With
    `average`, λ is chosen such that the mean share over layers is `average`.
    """

    label: ClassVar[str] = "pyramid_drop"

    variant: Variant = "paper"
    stages: int = Field(default=4, ge=2)
    ratio: float = Field(default=0.5, gt=0, le=1)
    average: float | None = Field(default=None, gt=0, le=1)

    def _steps(self, depth: int, context: Context) -> list[TokenPruningStep]:
        cuts = [round(depth * stage / self.stages) for stage in range(1, self.stages)]
        if len({0, *cuts, depth}) != self.stages + 1:
            raise UserError(
                f"stages={self.stages} is too many for a decoder of {depth} layers: use fewer"
            )
        ratio = (
            self.ratio if self.average is None else _ratio_for_average(self.average, cuts, depth)
        )
        return [
            TokenPruningStep(
                self.label,
                cut,
                Quota(share=ratio**power),
                self._choose,
                # The release reads the next layer, which is possible after another pruning step.
                attention=self.variant == "paper",
                macs=self._macs,
            )
            for power, cut in enumerate(cuts, start=1)
        ]

    def _choose(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        if self.variant == "release":
            return attended_in_next_layer(inputs, keep_I)
        score_IM = inputs.products(inputs.last_row())[:, 0]
        return TokenSelection(top_tokens(score_IM, inputs.valid, keep_I))

    def _macs(self, sizes: SelectionSizes) -> float:
        return sizes.row_macs if self.variant == "paper" else next_layer_macs(sizes)


def attended_in_next_layer(inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
    """Choose the tokens to which the last prompt token would attend most in the next layer."""
    score_IM = inputs.attention(inputs.last_row(), upcoming=True)[:, 0]
    return TokenSelection(top_tokens(score_IM, inputs.valid, keep_I))


def next_layer_macs(sizes: SelectionSizes) -> float:
    """Return the multiply-adds of `attended_in_next_layer`."""
    # The next layer's queries are computed for all text rows, its keys for all rows.
    text, head = sizes.samples * sizes.text, sizes.width * sizes.head_dim
    keys = sizes.groups * (text + sum(sizes.counts))
    return sizes.row_macs + head * (sizes.query_heads * text + keys)


def _ratio_for_average(average: float, cuts: list[int], depth: int) -> float:
    """Solve by bisection for the λ whose shares 1, λ, λ², ... have this mean over the layers."""
    if average * depth <= cuts[0]:
        raise UserError(
            f"average={average} cannot be met: the first stage, {cuts[0] / depth:.3g} of the "
            "layers, keeps all tokens; raise average or use more stages"
        )
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, depth], strict=True)]
    low, high = 0.0, 1.0
    # The mean increases with λ, and 60 bisections reach the precision of float64. `high` is
    # returned, so that the mean is never below `average`.
    for _ in range(60):
        middle = (low + high) / 2
        mean = sum(n * middle**power for power, n in enumerate(lengths)) / depth
        low, high = (middle, high) if mean < average else (low, middle)
    return high
