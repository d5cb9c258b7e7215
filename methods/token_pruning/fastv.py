"""FastV (Chen et al., ECCV 2024): remove tokens that get little attention from the last token."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from bench.method import Context
from methods.token_pruning.base import InDecoder, top_tokens
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import SelectionSizes, TokenPruningStep


class FastV(InDecoder):
    """Run `after` layers (K), then keep the tokens to which the last prompt token attends most.

    The score is its attention in layer K - 1, averaged over heads. With `average`, the number of
    tokens kept is k = (average L - K n) / (L - K).
    """

    label: ClassVar[str] = "fastv"

    after: int = Field(default=2, ge=1)

    def _steps(self, depth: int, context: Context) -> list[TokenPruningStep]:
        quota = self._quota(self.after, depth)
        return [
            TokenPruningStep(
                self.label, self.after, quota, self._choose, attention=True, macs=self._macs
            )
        ]

    def _choose(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        score_IM = inputs.attention(inputs.last_row())[:, 0]
        return TokenSelection(top_tokens(score_IM, inputs.valid, keep_I))

    def _macs(self, sizes: SelectionSizes) -> float:
        return sizes.row_macs
