"""Budgets, places of selection, reports; the best tokens of each frame."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bench.errors import UserError
from bench.method import Context
from bench.models.model import Model
from bench.models.structure.model_structure import ModelStructure
from methods.visual_engine.decoder import VisualEngine
from methods.visual_engine.plan import VisualPlan
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import ChooseTokens, SelectionSizes, TokenPruningStep
from methods.visual_engine.settings import Quota
from methods.visual_engine.strategy import VisualStrategy, tokens_by_stage

Amount = (
    Annotated[int, Field(ge=1, strict=True)]
    | Annotated[float, Field(gt=0, le=1, strict=True)]
    | Literal["all"]
)


class TokenPruning(VisualStrategy):
    """A method that removes visual tokens from the sequence for good; strategies compose with it.

    Tokens that stay keep their position ids and their cells in the image, so windows still hold. A
    frame is an image, a tile of an image or a time step of a video; budgets are per frame. An
    amount is a number of tokens (an integer), a share of the frame's tokens (a float; 1.0 is all of
    them, 1 is one token), or `all`.
    """

    # The method's name in messages and reports; equal to the name of its config.
    label: ClassVar[str]
    reads_tower: ClassVar[bool] = False

    def check(self, structure: ModelStructure) -> None:
        """Also refuse the masked execution, impossible budgets and impossible layers.

        An unsupported vision tower is refused later, in `apply`: it needs the loaded network.
        """
        super().check(structure)
        if self.execution != "skip":
            raise UserError(
                f"execution={self.execution}: token pruning removes tokens; set execution=skip"
            )
        # Dry run on an empty plan: `select` does the validation, so a run fails here, before any
        # weights are loaded, with the message it would fail with later.
        plan = VisualPlan.dense(len(structure.layers))
        for selection in self._selections(len(structure.layers), Context(seed=0)):
            plan.select(selection)

    def configure(self, engine: VisualEngine, model: Model, context: Context) -> dict[str, Any]:
        """Add the pruning steps to the plan; report their quotas and the tokens of each stage."""
        if self.reads_tower:
            engine.watch_tower()
            model.needs_pixels = True
        added = self._selections(len(engine.decoder.layers), context)
        for selection in added:
            engine.plan.select(selection)
        model.overhead = engine.overhead.measured
        # Many methods choose by the question, which comes after the image: an image prefix alone
        # cannot be computed once and shared.
        model.needs_prompt = True
        return {
            "selections": [{"after": s.after, **asdict(s.quota)} for s in added],
            **tokens_by_stage(engine),
        }

    @abstractmethod
    def _selections(self, depth: int, context: Context) -> list[TokenPruningStep]:
        """Return the pruning steps of a decoder of `depth` layers."""


class BeforeDecoder(TokenPruning):
    """A method that prunes once, before the decoder; `keep` is thus the average over layers."""

    keep: Amount = 0.25

    def _selections(self, depth: int, context: Context) -> list[TokenPruningStep]:
        quota, choose = Quota.of(self.keep), self._bound_choose(context)
        return [TokenPruningStep(self.label, 0, quota, choose, macs=self._macs)]

    def _bound_choose(self, context: Context) -> ChooseTokens:
        """Return `_choose`, bound to what it needs of the run."""
        return self._choose

    @abstractmethod
    def _choose(self, sight: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        """Choose `keep` tokens of every frame."""

    @abstractmethod
    def _macs(self, sizes: SelectionSizes) -> float:
        """Return the multiply-adds of the choice itself."""


class InDecoder(TokenPruning):
    """A method that prunes once, after some layers.

    Set either `keep`, the amount that stays from there on, or `average`, the mean over all layers.
    """

    keep: Amount | None = 0.25
    average: Amount | None = None

    def _quota(self, after: int, depth: int) -> Quota:
        if (self.keep is None) == (self.average is None):
            raise UserError(
                f"keep={self.keep} and average={self.average}: set exactly one, the other to null"
            )
        if self.keep is not None:
            return Quota.of(self.keep)
        assert self.average is not None
        return Quota.averaging(self.average, after, depth)


def top_tokens(score_IM: Tensor, allowed_IM: Tensor, keep_I: Tensor) -> Tensor:
    """Mark the `keep` highest of the allowed scores of each frame, bool [I, M].

    Ties go to the earlier token.
    """
    score_IM = score_IM.masked_fill(~allowed_IM, -torch.inf)
    # `topk` takes one k for all rows, but budgets differ between frames; the argsort of an argsort
    # is each token's rank, which is compared with the frame's own budget.
    rank_IM = score_IM.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank_IM < keep_I[:, None]) & allowed_IM


def pairwise_cosine(x_IMD: Tensor) -> Tensor:
    """Return the cosine of every pair of tokens of a frame, [I, M, M], in float32."""
    unit_IMD = torch.nn.functional.normalize(x_IMD.float(), dim=-1)
    return unit_IMD @ unit_IMD.transpose(1, 2)
