"""Base classes of token pruning: budgets, pruning steps and reports; scores shared by methods.

Shapes: I frames, M tokens of a frame, D width, F width of the tower's features.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from bench.errors import UserError
from bench.method import ALL_FORMS, Context, WeightForm
from bench.models.model import Model
from bench.models.structure.model_structure import ModelStructure
from bench.models.vlm.vision_tower import LayerRequest, TowerOutput
from methods.visual_engine.decoder import VisualEngine
from methods.visual_engine.plan import VisualPlan
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.selection_step import ChooseTokens, SelectionSizes, TokenPruningStep
from methods.visual_engine.settings import Quota
from methods.visual_engine.strategy import VisualStrategy, tokens_by_stage


def _refuse_one(amount: Any) -> Any:
    # In a sweep such as keep=0.25,0.5,1 the last value is meant as all tokens.
    if isinstance(amount, int) and amount == 1:
        raise ValueError(
            "1 would be a single token, and 1.0 is a share of 100 %: write 1.0 or all, or 2 or more"
        )
    return amount


Amount = Annotated[
    Annotated[int, Field(ge=2, strict=True)]
    | Annotated[float, Field(gt=0, le=1, strict=True)]
    | Literal["all"],
    BeforeValidator(_refuse_one),
]

Variant = Literal["paper", "release"]
"""Which definition a method follows if its paper and the authors' code differ."""


class TokenPruning(VisualStrategy):
    """A method that permanently removes visual tokens from the sequence.

    With `positions=kept`, the remaining tokens keep their position ids. With `renumbered`, ids have
    no gaps after the removal, as if the removed tokens had never existed; this applies to later
    layers and to generated tokens, separately for each layer. In both cases tokens keep their cells
    in the image, on which windows depend.

    A frame is an image, a tile of an image or a time step of a video; budgets are per frame. An
    amount is a number of tokens (an integer), a share of the frame's tokens (a float; 1.0 is all of
    them, and 1 is refused), or `all`.
    """

    positions: Literal["kept", "renumbered"] = "kept"

    # The method's name in messages and reports; equal to the name of its config.
    label: ClassVar[str]
    accepts: ClassVar[frozenset[WeightForm]] = ALL_FORMS | {"prequantized"}
    reads_tower: ClassVar[bool] = False

    def check(self, structure: ModelStructure) -> None:
        """Also refuse masked execution, impossible budgets and layers that do not exist.

        An unsupported vision tower is refused in `apply`, since it takes the loaded network.
        """
        super().check(structure)
        if self.execution != "skip":
            raise UserError(
                f"execution={self.execution}: token pruning removes tokens; set execution=skip"
            )
        if self.positions == "renumbered" and _has_image_positions(structure):
            raise UserError(
                f"positions=renumbered: the positions of {structure.architecture} are rows and "
                "columns of its images, which have no order to close gaps in: set positions=kept"
            )
        # A dry run on an empty plan: `add_step` validates the steps, and here it does so before
        # weights are loaded.
        plan = VisualPlan.dense(len(structure.layers))
        for step in self._placed_steps(len(structure.layers), Context(seed=0)):
            plan.add_step(step)

    def configure(self, engine: VisualEngine, model: Model, context: Context) -> dict[str, object]:
        """Add the pruning steps to the plan; report their quotas and the tokens of each stage."""
        if self.reads_tower:
            engine.record_tower(*self._tower_layers())
            model.needs_pixels = True
        added = self._placed_steps(len(engine.decoder.layers), context)
        for step in added:
            engine.plan.add_step(step)
        model.overhead = engine.overhead.measured
        # Many methods depend on the question, which comes after the image, so the prefix with the
        # image cannot be computed once and shared.
        model.needs_prompt = True
        return {
            "selections": [
                {"after": s.after, "adaptive": s.adaptive, **asdict(s.quota)} for s in added
            ],
            **tokens_by_stage(engine),
        }

    def _tower_layers(self) -> tuple[LayerRequest, ...]:
        """Return the layers of the vision tower to read in addition to the projected one."""
        return ()

    @abstractmethod
    def _steps(self, depth: int, context: Context) -> list[TokenPruningStep]:
        """Return the pruning steps of a decoder of `depth` layers."""

    def _placed_steps(self, depth: int, context: Context) -> list[TokenPruningStep]:
        """Return the pruning steps with `positions` applied."""
        renumbers = self.positions == "renumbered"
        return [replace(step, renumbers=renumbers) for step in self._steps(depth, context)]


def _has_image_positions(structure: ModelStructure) -> bool:
    """Whether positions have several parts (M-RoPE)."""
    config: Any = getattr(getattr(structure.layers[0], "self_attn", None), "config", None)
    return "mrope_section" in (getattr(config, "rope_parameters", None) or {})


class BeforeDecoder(TokenPruning):
    """A method that prunes once, before the decoder, so that `keep` is the average over layers."""

    keep: Amount = 0.25

    def _steps(self, depth: int, context: Context) -> list[TokenPruningStep]:
        return [
            TokenPruningStep(
                self.label,
                0,
                self._quota(),
                self._bound_choose(context),
                reads_tower=self.reads_tower,
                macs=self._macs,
            )
        ]

    def _quota(self) -> Quota:
        """Return the quota given by `keep`."""
        return Quota.of(self.keep)

    def _bound_choose(self, context: Context) -> ChooseTokens:
        """Return `_choose`; a subclass can bind values of the run, such as its seed."""
        return self._choose

    @abstractmethod
    def _choose(self, inputs: SelectionInputs, keep_I: Tensor) -> TokenSelection:
        """Choose `keep` tokens of every frame."""

    @abstractmethod
    def _macs(self, sizes: SelectionSizes) -> float:
        """Return the multiply-adds of the choice itself."""


class InDecoder(TokenPruning):
    """A method that prunes once, after some layers.

    Set either `keep`, the amount kept in later layers, or `average`, the mean over all layers.
    """

    keep: Amount | None = 0.25
    average: Amount | None = None

    def _quota(self, after: int, depth: int) -> Quota:
        if self.keep is not None and self.average is None:
            return Quota.of(self.keep)
        if self.keep is None and self.average is not None:
            return Quota.averaging(self.average, after, depth)
        raise UserError(
            f"keep={self.keep} and average={self.average}: set exactly one of them, and the other "
            "to null"
        )


def require_whole_images(inputs: SelectionInputs, name: str) -> None:
    """Raise `UserError` if an earlier step has removed tokens."""
    if inputs.frames.counts != inputs.initial_counts:
        raise UserError(f"{name} needs whole images: list it before other token pruning")


def frame_sides(inputs: SelectionInputs, name: str) -> tuple[Tensor, Tensor]:
    """Return the number of rows and of columns of every frame, [I] each.

    Raises:
        UserError: an earlier step has removed tokens, so that rows are incomplete.
    """
    require_whole_images(inputs, name)
    cells = inputs.cells.row_N, inputs.cells.column_N
    rows_I, columns_I = (part.masked_fill(~inputs.valid, 0).amax(dim=1) + 1 for part in cells)
    return rows_I, columns_I


def frames_of_samples(inputs: SelectionInputs, name: str) -> list[list[int]]:
    """Return the frame numbers of each sample, whose tokens are compared by position.

    Raises:
        UserError: the frames of a sample differ in size, or have lost tokens.
    """
    sides = list(zip(*(side.tolist() for side in frame_sides(inputs, name)), strict=True))
    found: dict[int, list[int]] = {}
    for frame, sample in enumerate(inputs.frames.sample_I.tolist()):
        found.setdefault(sample, []).append(frame)
    for frames in found.values():
        if len({sides[frame] for frame in frames}) > 1:
            raise UserError(
                f"{name} compares the frames of a prompt position by position, but the images of a "
                "prompt differ in size: use frames of equal size"
            )
    return list(found.values())


def top_tokens(score_IM: Tensor, allowed_IM: Tensor, keep_I: Tensor) -> Tensor:
    """Mark the `keep` highest of the allowed scores of each frame, bool [I, M].

    Ties go to the earlier token.
    """
    score_IM = score_IM.masked_fill(~allowed_IM, -torch.inf)
    # `topk` takes the same k for all rows, but budgets differ between frames. The argsort of an
    # argsort is each token's rank, which is compared with the frame's own budget.
    rank_IM = score_IM.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank_IM < keep_I[:, None]) & allowed_IM


def reproject(
    inputs: SelectionInputs, tower: TowerOutput, marked_IM: Tensor, features_IMF: Tensor
) -> Tensor:
    """Return the tokens' states with the marked ones projected from new features, [I, M, D]."""
    states_IMD = inputs.states_IMD.clone()
    states_IMD[marked_IM] = tower.project(features_IMF[marked_IM]).to(states_IMD.dtype)
    return states_IMD


def evenly_spaced(allowed_IM: Tensor, count_I: Tensor) -> Tensor:
    """Mark `count` allowed tokens of each frame at even distances, bool [I, M].

    Of n allowed tokens in order, these are the ones at ⌊j n / count⌋ for j from 0 to count - 1.
    """
    n_I1, count_I1 = allowed_IM.sum(dim=1, keepdim=True), count_I[:, None]
    order_IM = allowed_IM.cumsum(dim=1) - 1
    # Decided per token, since `count` differs between frames: token i is marked if some j has
    # ⌊j n / count⌋ = i, for which j = ⌈i count / n⌉ is the only candidate. In integers, because a
    # rounded quotient could drop or duplicate a token.
    j_IM = -((-order_IM * count_I1) // n_I1.clamp(min=1))
    taken_IM = (j_IM * n_I1 // count_I1.clamp(min=1) == order_IM) & (j_IM < count_I1)
    return taken_IM & allowed_IM


def regularly_spaced(allowed_IM: Tensor, count_I: Tensor) -> Tensor:
    """Mark every s-th allowed token of each frame, starting with the first, bool [I, M].

    `count` tokens are marked. With n allowed tokens, s = max(1, ⌊n / count⌋), so the last ones are
    never marked unless s divides n.
    """
    n_I1, count_I1 = allowed_IM.sum(dim=1, keepdim=True), count_I[:, None]
    order_IM = allowed_IM.cumsum(dim=1) - 1
    step_I1 = (n_I1 // count_I1.clamp(min=1)).clamp(min=1)
    return allowed_IM & (order_IM % step_I1 == 0) & (order_IM // step_I1 < count_I1)


def pairwise_cosine(x_IMD: Tensor) -> Tensor:
    """Return the cosine of every pair of tokens of a frame, [I, M, M], in float32."""
    unit_IMD = torch.nn.functional.normalize(x_IMD.float(), dim=-1)
    return unit_IMD @ unit_IMD.transpose(1, 2)
