"""Base classes of token pruning methods: budgets, pruning points, reports."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from bench.errors import UserError
from bench.method import Context
from bench.models.anatomy import Anatomy
from bench.models.model import Model
from bench.models.multimodal import frame_size
from methods.visual_tokens.engine import Engine
from methods.visual_tokens.plan import Selection, VisualPlan
from methods.visual_tokens.quota import Quota
from methods.visual_tokens.sight import Choice, Sight
from methods.visual_tokens.sizes import Sizes
from methods.visual_tokens.strategy import VisualStrategy
from methods.visual_tokens.work import average_tokens, stages_of

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

    reads_tower: ClassVar[bool] = False

    def check(self, anatomy: Anatomy) -> None:
        """Also refuse the masked execution, impossible budgets and impossible layers.

        An unsupported vision tower is refused later, in `apply`: it needs the loaded network.
        """
        super().check(anatomy)
        if self.form != "skip":
            raise UserError(f"form={self.form}: token pruning removes tokens; use form=skip")
        # Dry run on an empty plan: `select` does the validation, so a run fails here, before any
        # weights are loaded, with the message it would fail with later.
        plan = VisualPlan.dense(len(anatomy.layers))
        for selection in self._selections(len(anatomy.layers), Context(seed=0)):
            plan.select(selection)

    def _set(self, engine: Engine, model: Model, context: Context) -> dict[str, Any]:
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
            **tokens_of(engine),
        }

    @abstractmethod
    def _selections(self, depth: int, context: Context) -> list[Selection]:
        """Return the pruning steps of a decoder of `depth` layers."""


class BeforeDecoder(TokenPruning):
    """A method that prunes once, before the decoder; `keep` is thus the average over layers."""

    keep: Amount = 0.25

    def _selections(self, depth: int, context: Context) -> list[Selection]:
        # The name in messages and reports is the module's name, which equals the name of the
        # method's config only as long as each module defines one method.
        name = type(self).__module__.rpartition(".")[2]
        quota, chooser = Quota.of(self.keep), self._chooser(context)
        return [Selection(name, 0, quota, chooser, macs=self._macs)]

    def _chooser(self, context: Context) -> Any:
        return self._choose

    @abstractmethod
    def _choose(self, sight: Sight, keep_I: Tensor) -> Choice:
        """Choose `keep` tokens of every frame."""

    @abstractmethod
    def _macs(self, sizes: Sizes) -> float:
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


def tokens_of(engine: Engine) -> dict[str, Any]:
    """Report a frame's tokens by stage of the whole plan, and their average over layers.

    All are None for models without a fixed image size; a cost for any size can be computed from the
    report's `work`.
    """
    size = frame_size(engine.network.config)
    if size is None:
        return {"frame": None, "stages": None, "average_tokens": None}
    stages = stages_of(engine, size[0] * size[1])
    average = average_tokens(stages)
    return {"frame": size[0] * size[1], "stages": stages, "average_tokens": average}
