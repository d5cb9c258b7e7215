"""Baselines that score whole experts on calibration text and drop the lowest.

Expert frequency drops the experts to which the fewest tokens are routed. REAP (arXiv 2510.13999)
drops those that contribute least to the tokens routed to them.

Shapes: E routed experts, S tokens of one expert, D d_model, F an expert's width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from bench.method import Context, MethodReport
from bench.models.expert_hooks import ExpertObserver
from bench.models.model import Model
from bench.models.structure.moe_block import MoEBlock
from methods.baselines.expert_removal import ExpertState, WholeExpertPruning, select_whole_experts
from methods.moe.calibration import NullObserver, SequentialPruning, require_finite
from methods.moe.micro_experts import expert_view
from methods.moe.pruning import refuse_offloaded, require_calibration


class ExpertScorer(ExpertObserver, Protocol):
    """An observer of one block that yields one score per expert."""

    def scores(self) -> Tensor:
        """Return the score of every routed expert, float64 [E]; the lowest are removed."""


class ScoredExpertPruning(WholeExpertPruning, SequentialPruning):
    """A method that removes the experts of lowest score; ties are broken by index."""

    @abstractmethod
    def observer(self, block: MoEBlock) -> ExpertScorer:
        """Return a fresh observer of a block."""

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Score and remove, block by block; the report holds every score."""
        calibration = require_calibration(context)
        structure = model.structure
        refuse_offloaded(structure.moe)
        layers = []
        observed = self.observe_blocks(model, calibration.tokens, self.observer, context.progress)
        for (block, observer), budget in zip(observed, self.budgets(structure), strict=True):
            score_E = observer.scores()
            require_finite(block, score_E)
            # Stable: equal scores, such as those of experts without tokens, are ordered by index on
            # every device.
            order = torch.argsort(score_E, stable=True).tolist()
            chosen = select_whole_experts(block.widths, order, budget)
            layer = self.remove_experts(block, chosen, structure, context.seed)
            layers.append(layer | {"scores": score_E.tolist()})
        return self.build_report(
            model,
            structure,
            layers,
            sequential=self.sequential,
            calibration=calibration.fingerprint,
            tokens=calibration.tokens.numel(),
        )


class ExpertTokenCounts(NullObserver):
    """N_e: number of tokens that have expert e among their top k."""

    def __init__(self, block: MoEBlock) -> None:
        # On the CPU, because counts are Python integers.
        self._tokens_E = torch.zeros(block.num_experts, dtype=torch.float64)

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Count the tokens of one expert."""
        self._tokens_E[expert] += len(weight_S)

    def scores(self) -> Tensor:
        """Return N, float64 [E]."""
        return self._tokens_E


class ExpertFrequency(ScoredExpertPruning):
    """Remove the experts that are used least often."""

    def observer(self, block: MoEBlock) -> ExpertTokenCounts:
        """Return a fresh observer of a block."""
        return ExpertTokenCounts(block)


class ReapSaliency(NullObserver):
    """S_e = mean over the tokens t routed to e of A_te · ‖f_e(x_t)‖₂ (router-weighted norm).

    A is the weight that the model's router applies, f_e the expert without it. An expert without
    tokens has S_e = 0.
    """

    def __init__(self, block: MoEBlock) -> None:
        device = expert_view(block, 0).down.device
        self._block = block
        self._sum_E = torch.zeros(block.num_experts, dtype=torch.float64, device=device)
        self._tokens_E = torch.zeros(block.num_experts, dtype=torch.float64, device=device)

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one expert."""
        output_SD = self._block.expert(expert).combine(hidden_SF)
        # The sum of D squares can overflow or lose digits in half precision.
        norm_S = torch.linalg.vector_norm(output_SD, dim=1, dtype=torch.float32)
        self._sum_E[expert] += (norm_S * weight_S.float()).sum(dtype=torch.float64)
        self._tokens_E[expert] += len(weight_S)

    def scores(self) -> Tensor:
        """Return S, float64 [E]."""
        # The mean over routed tokens, not all tokens: frequency is not a part of REAP's score.
        return self._sum_E / self._tokens_E.clamp_min(1)


class Reap(ScoredExpertPruning):
    """Remove the experts of lowest saliency, measured on the unpruned model.

    As published, the router does not select them (`state=dropped`), and all layers are measured
    before any of them is changed (`sequential=false`).
    """

    state: ExpertState = "dropped"
    sequential: bool = False

    def observer(self, block: MoEBlock) -> ReapSaliency:
        """Return a fresh observer of a block."""
        return ReapSaliency(block)
