"""Base class of baselines that score every routed expert and drop the lowest."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from bench.method import Context, MethodReport
from bench.models.anatomy import MoEBlock
from bench.models.model import Model
from bench.models.observation import Observer
from methods.baselines.whole_experts import WholeExperts, cut
from methods.moe_pruning import calibration_of, refuse_offloaded
from methods.walking import Walker, refuse_nan


class ExpertScores(Observer, Protocol):
    """An observer of one block that yields one score per expert."""

    def scores(self) -> Tensor:
        """Return the score of every routed expert, float64 [E]; the lowest are removed."""


class ScoredExperts(WholeExperts, Walker):
    """A method that removes the experts of lowest score; ties are broken by index."""

    uses_calibration: ClassVar[bool] = True

    @abstractmethod
    def observer(self, block: MoEBlock) -> ExpertScores:
        """Return a fresh observer of a block."""

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Score and remove, block by block; the report holds every score."""
        calibration = calibration_of(context)
        anatomy = model.anatomy
        refuse_offloaded(anatomy.moe)
        layers = []
        seen = self.watch(model, calibration.tokens, self.observer, context.progress)
        for (block, observer), budget in zip(seen, self.budgets(anatomy), strict=True):
            score_E = observer.scores()
            refuse_nan(block, score_E)
            # Stable: equal scores, such as the zeros of experts that were never reached, keep their
            # index order on every device.
            order = torch.argsort(score_E, stable=True).tolist()
            chosen = cut(block.widths, order, budget)
            layer = self.carry_out(block, chosen, anatomy, context.seed)
            layers.append(layer | {"scores": score_E.tolist()})
        return self.report(
            model,
            anatomy,
            layers,
            sequential=self.sequential,
            calibration=calibration.fingerprint,
            tokens=calibration.tokens.numel(),
        )
