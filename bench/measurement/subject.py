"""Who is measured: a model, and the dense one beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from bench.models.model import Model


@dataclass(frozen=True)
class Subject:
    """A model, the dense one where there is one to compare with, and why it may claim no gain.

    `no_gain` is the word for weights that are still there (`masked`, `zeroed`), or the reason why
    the dense model is missing; None where gains are real, or where nothing is compared.
    """

    model: Model
    dense: Model | None = None
    no_gain: str | None = None

    @property
    def networks(self) -> list[nn.Module]:
        """The model's network, then the dense one if there is one."""
        return [self.model.network, *([self.dense.network] if self.dense else [])]
