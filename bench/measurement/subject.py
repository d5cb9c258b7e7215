"""The pair of models that is measured: the compressed one and its dense baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from bench.models.model import Model


@dataclass(frozen=True)
class Subject:
    """A model, its dense baseline if there is one, and the reason why no gain may be reported.

    `no_gain` is the effect of methods that leave all weights in place (`masked`, `zeroed`), or the
    reason why the dense model is missing. It is None if gains are real or nothing is compared.
    """

    model: Model
    dense: Model | None = None
    no_gain: str | None = None

    @property
    def networks(self) -> list[nn.Module]:
        """The model's network, followed by the dense one if there is one."""
        # Everything that is measured per network relies on this order: index 1 is the baseline.
        return [self.model.network, *([self.dense.network] if self.dense else [])]
