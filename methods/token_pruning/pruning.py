"""What the pruning methods share: budgets, where they select, what they report."""

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
    """A method by which visual tokens leave the sequence for good; the strategies compose with it.

    Tokens that stay keep their positions and their places in the image, so that windows still
    hold. A frame is an image, a tile of it or a time step of a video, and budgets are per frame.
    An amount is a number of tokens (an integer), a share of the frame's tokens (a fraction; 1.0 is
    all of them, 1 is one token), or `all`.
    """

    reads_tower: ClassVar[bool] = False

    def check(self, anatomy: Anatomy) -> None:
        """Refuse also the official form, and budgets and layers that cannot be.

        A tower that is not understood is refused when the model is there.
        """
        super().check(anatomy)
        if self.form != "skip":
            raise UserError(f"form={self.form}: pruned tokens are really gone, so it must be skip")
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
        model.needs_prompt = True  # many choose by the question, which comes after the image
        return {
            "selections": [{"after": s.after, **asdict(s.quota)} for s in added],
            **tokens_of(engine),
        }

    @abstractmethod
    def _selections(self, depth: int, context: Context) -> list[Selection]:
        """Return where tokens leave a decoder of `depth` layers, and how they are chosen."""


class BeforeDecoder(TokenPruning):
    """A method that chooses once, before the decoder; `keep` is also the average over layers."""

    keep: Amount = 0.25

    def _selections(self, depth: int, context: Context) -> list[Selection]:
        # A module is called as the method's config is, and has one method.
        name = type(self).__module__.rpartition(".")[2]
        quota, chooser = Quota.of(self.keep), self._chooser(context)
        return [Selection(name, 0, quota, chooser, macs=self._macs)]

    def _chooser(self, context: Context) -> Any:
        return self._choose

    @abstractmethod
    def _choose(self, sight: Sight, keep_I: Tensor) -> Choice:
        """Return `keep` tokens of every frame."""

    @abstractmethod
    def _macs(self, sizes: Sizes) -> float:
        """Return the multiply-adds of choosing."""


class InDecoder(TokenPruning):
    """A method that chooses once, after some layers.

    Either `keep` is what stays from there on, or `average` is the mean over all layers.
    """

    keep: Amount | None = 0.25
    average: Amount | None = None

    def _quota(self, after: int, depth: int) -> Quota:
        """Return what stays after `after` of `depth` layers."""
        if (self.keep is None) == (self.average is None):
            raise UserError(
                f"keep={self.keep} and average={self.average}: set one and leave the other null"
            )
        if self.keep is not None:
            return Quota.of(self.keep)
        assert self.average is not None
        return Quota.averaging(self.average, after, depth)


def tokens_of(engine: Engine) -> dict[str, Any]:
    """Return the tokens of a frame by stage of the whole plan and their average over layers.

    Both are None where images are of free size; `cost` counts any size from the report's `work`.
    """
    size = frame_size(engine.network.config)
    if size is None:
        return {"frame": None, "stages": None, "average_tokens": None}
    stages = stages_of(engine, size[0] * size[1])
    average = average_tokens(stages)
    return {"frame": size[0] * size[1], "stages": stages, "average_tokens": average}
