"""The Method protocol: the only thing that a plug-in must know.

A method is a pydantic model whose fields are its knobs. It exists because a file
`conf/method/NAME.yaml` names it as `_target_`; nothing is registered. `check` sees the model's
anatomy before any weight is loaded and refuses with a `UserError`; `apply` changes the network
in place and reports what it did in numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from bench.progress import SILENT, Progress

if TYPE_CHECKING:
    from pathlib import Path

    from bench.data.calibration import Calibration
    from bench.data.prompts import Samples
    from bench.models.anatomy import Anatomy
    from bench.models.model import Model

__all__ = ["Context", "Method", "MethodReport", "Saving"]

Saving = Literal["removed", "zeroed", "masked", "quantized", "skipped", "none"]


@dataclass(frozen=True)
class MethodReport:
    """What a method did: how its saving is realised, and its counts for the record.

    `saving` decides which gains a record may claim: zeroed and masked weights still cost their
    time and memory. `details` holds JSON values only.
    """

    saving: Saving
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What a run lends to a method besides the model.

    `calibration` is tokenised text, shape [rows, length] int64; None unless the method sets
    `uses_calibration`. `prompts` are images with questions as the model's processor made them;
    None unless it says `uses_prompts`. `seed` is the run's; a method derives its own generators
    from it. `folder` is this method's own, for what lets it go on after a kill: the same run finds
    it there again, and it is gone once the run is recorded. It need not exist.
    """

    seed: int
    calibration: Calibration | None = None
    prompts: Samples | None = None
    progress: Progress = SILENT
    folder: Path | None = None


class Method(BaseModel, ABC):
    """A plug-in that changes a model; fields are knobs, unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uses_calibration: ClassVar[bool] = False

    @property
    def uses_prompts(self) -> bool:
        """Whether, with these knobs, it asks for prompts with images."""
        return False

    @abstractmethod
    def check(self, anatomy: Anatomy) -> None:
        """Raise `UserError` when this method does not fit such a model; no weight is loaded yet."""

    @abstractmethod
    def apply(self, model: Model, context: Context) -> MethodReport:
        """Change `model.network` in place and say what was done."""
