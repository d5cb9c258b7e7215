"""The Method protocol: all that a plug-in needs to know.

A method is a pydantic model whose fields are its knobs. A file `conf/method/NAME.yaml` registers it
by naming it as `_target_`. `check` gets the model's structure before weights are loaded, and raises
a `UserError` if the method does not fit; `apply` changes the network in place and reports its
effect in numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from bench.errors import UserError
from bench.ui import SILENT, Progress

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from bench.data.calibration import Calibration
    from bench.data.prompts import ProcessedPrompts
    from bench.models.model import Model
    from bench.models.structure.model_structure import ModelStructure

WeightForm = Literal["plain", "ragged", "packed", "shared_base", "novices", "prequantized"]
"""How weights are stored: as published (`plain`), in experts of different widths, quantized and
packed, as a base with low-rank differences, with some experts as constants, or quantized in the
loaded checkpoint."""
ALL_FORMS: frozenset[WeightForm] = frozenset(get_args(WeightForm)) - {"prequantized"}
"""The forms that methods make. Only methods that change no weights accept `prequantized` too."""

Effect = Literal["removed", "zeroed", "masked", "quantized", "skipped", "none"]


class LayerReport(BaseModel):
    """Effect of a method on one layer.

    The declared fields are those that figures read; they are None if they do not apply to the
    method. A method can add more JSON values under its own names. Lists per expert are in the order
    of `experts`, which includes shared experts.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    layer: int
    experts: list[str | int] | None = None
    removed: int | None = None
    width_per_expert: list[int] | None = None
    removed_per_expert: list[int] | None = None
    energy_per_expert: list[float] | None = None
    mean_bits: float | None = None

    @model_serializer
    def _without_absent(self) -> dict[str, object]:
        # None is left out, because null in a record would look like a failed measurement. Iterating
        # over the model instead is slow.
        values = {**self.__dict__, **(self.__pydantic_extra__ or {})}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class MethodReport:
    """Result of a method: its effect on the weights, and its counts for the record.

    `effect` determines which gains a record may claim: zeroed and masked weights still take time
    and memory. The run counts the network before and after the method, and claims only what the
    counts confirm. `trained` says that the weights were fitted to data, so that a network with
    random weights does not count as untrained afterwards. `details` holds JSON values for the whole
    model, `layers` those per layer.
    """

    effect: Effect
    details: dict[str, Any] = field(default_factory=dict)
    layers: Sequence[LayerReport] = ()
    trained: bool = False

    def __post_init__(self) -> None:
        if self.effect not in get_args(Effect):
            raise UserError(
                f"a method reports the effect {self.effect!r}; allowed: "
                f"{', '.join(get_args(Effect))}"
            )


@dataclass(frozen=True)
class Context:
    """Inputs that a run provides to a method besides the model.

    `calibration` is tokenised text, shape [rows, length] int64; None unless the method sets
    `uses_calibration`. `prompts` are images with questions, encoded by the model's processor; None
    unless `uses_prompts` is true. `seed` is that of the run; a method derives its own generators
    from it. `folder` is a private folder for checkpoints, which may not exist yet. If the run is
    killed and repeated, the method gets the same folder; it is deleted when the run is recorded.
    """

    seed: int
    calibration: Calibration | None = None
    prompts: ProcessedPrompts | None = None
    progress: Progress = SILENT
    folder: Path | None = None


@dataclass(frozen=True)
class InputSize:
    """Size of a run's calibration inputs: rows of `length` tokens, `visual` of them an image's.

    `batch` of them pass together where a method has no batch of its own. For a method that reads
    none there are no rows; `length` is then that of an image prompt, or 0 for models without
    images.
    """

    rows: int = 0
    length: float = 0.0
    visual: float = 0.0
    batch: int = 1

    @property
    def tokens(self) -> float:
        """Tokens of all rows."""
        return self.rows * self.length


@dataclass(frozen=True)
class RepeatedStep:
    """A step that a method repeats; an estimate on this machine runs it once on random numbers.

    `prepare` builds the inputs on a device, with weights of a dtype, and returns the step. `key`
    names everything that its time depends on, and is what the time is remembered by. `times` is how
    often the step runs; a step per routed expert (`routed`) runs only for experts that have tokens.
    On other hardware, and where a step is too large to try, its `flops`, the `elements` that it
    reads and writes, and the `operators` that Python launches are used.
    """

    key: str
    times: float
    prepare: Callable[[torch.device, torch.dtype], Callable[[], object]]
    flops: float = 0.0
    elements: float = 0.0
    operators: float = 0.0
    routed: bool = False


@dataclass(frozen=True)
class MethodWork:
    """What applying a method costs, for an estimate before the run.

    `forwards` are passes of all calibration inputs through the decoder's layers: in `observed` of
    them each expert is computed and looked at by itself, in `logits` of them the head computes
    every token's logits. `possible` are further ones that take place only if the data ask for them.
    `backwards` are passes with gradients (their forwards apart; half a one where all weights are
    frozen), of `together` rows at once. `trained` is rows of training steps in all, each as long as
    one of the inputs, with forward, logits and backward, also of `together` rows at once; `updated`
    is the share of the weights that get a gradient then.

    `readings` is how often all weights are read. On top come `flops` of other products, such as
    Gram matrices and factorizations, `elements` that are read and written, and `operators` that
    Python launches, and `steps` that can be timed by themselves. `memory` is bytes of statistics,
    gradients and moments that are held at once.

    `per_call` are the steps that every later forward of the changed network takes in addition to
    those of the dense one, such as dequantizing weights.
    """

    forwards: float = 0.0
    observed: float = 0.0
    logits: float = 0.0
    possible: float = 0.0
    backwards: float = 0.0
    trained: float = 0.0
    updated: float = 1.0
    together: int = 1
    readings: float = 1.0
    flops: float = 0.0
    elements: float = 0.0
    operators: float = 0.0
    memory: float = 0.0
    steps: tuple[RepeatedStep, ...] = ()
    per_call: tuple[RepeatedStep, ...] = ()


class Method(BaseModel, ABC):
    """A plug-in that changes a model; fields are knobs, and unknown ones are refused.

    `accepts` are the forms of weights that a method can change, and `leaves` is the form that it
    makes. With them an impossible order of methods is refused before any method is applied. By
    default a method accepts all forms and does not change them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    uses_calibration: ClassVar[bool] = False
    writes: ClassVar[tuple[str, ...]] = ()
    """Knobs that name outputs of the method. Files named by other knobs are part of a run's id."""
    accepts: ClassVar[frozenset[WeightForm]] = ALL_FORMS

    @property
    def leaves(self) -> WeightForm | None:
        """The form of the changed weights, with these knobs; None if it does not change."""
        return None

    @property
    def restarts(self) -> bool:
        """Whether, with these knobs, the method discards the model's weights and draws new ones."""
        return False

    @property
    def uses_prompts(self) -> bool:
        """Whether, with these knobs, the method uses prompts with images."""
        # A property, unlike `uses_calibration`, because it may depend on knobs.
        return False

    @abstractmethod
    def check(self, structure: ModelStructure) -> None:
        """Raise `UserError` if the method does not fit the model; called before weights load."""

    def planned_removals(self, structure: ModelStructure) -> Sequence[int] | None:
        """Return the number of units that `ratio` removes from each part, or None if unknown.

        A run is refused if its `ratio` is above 0 but removes no unit.
        """
        return None

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Return what `apply` costs with calibration inputs of a size, for an estimate.

        By default it is one pass if the method reads calibration inputs, two if it is sequential
        (a changed layer runs again), and one reading of the weights.
        """
        reads = self.uses_calibration or self.uses_prompts
        return MethodWork(forwards=(1.0 + bool(getattr(self, "sequential", False))) * reads)

    @abstractmethod
    def apply(self, model: Model, context: Context) -> MethodReport:
        """Change `model.network` in place and report the effect."""


BudgetUnit = Literal["groups", "macs", "bytes", "seconds"]
"""What the ratio of a classifier's sparse training counts."""


class RecipeConfig(BaseModel):
    """Training settings shared by all methods for image classifiers, for comparability.

    The solver of a method acts during the first `sparse_share` of the steps. Then the groups to
    keep are selected, the mask is frozen, and the remaining steps are fine-tuning. The learning
    rate rises to `rate` during the share `warmup` of all steps. `decay` is not applied to the
    weights of groups if the solver decays them itself, nor, with `decay_norms=false`, to biases and
    the scales and shifts of normalizations.

    With `dtype=bfloat16` the products of forward and backward are in bfloat16; weights, moments,
    statistics and the loss stay in float32. `channels_last` is the memory format of the images.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(default=30, ge=1)
    batch: int = Field(default=64, ge=2)
    optimizer: Literal["sgd", "adam"] = "sgd"
    rate: float = Field(default=0.1, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    decay: float = Field(default=5e-4, ge=0)
    decay_norms: bool = True
    sparse_share: float = Field(default=0.7, ge=0.1, le=1)
    save_every: int = Field(default=0, ge=0, description="steps; 0 saves after every epoch")
    dtype: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = False

    @model_validator(mode="after")
    def _settings_fit(self) -> RecipeConfig:
        if self.warmup >= self.sparse_share:
            raise ValueError(
                f"warmup={self.warmup} must be below sparse_share={self.sparse_share}, at which "
                "the rate has fallen to 0"
            )
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError("nesterov=true needs optimizer=sgd and momentum above 0")
        return self
