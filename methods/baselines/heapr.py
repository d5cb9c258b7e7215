"""HEAPr (arXiv 2509.22299): micro-experts by a second-order estimate of the loss without them.

Shapes: S tokens of one expert, D d_model, F an expert's width, N micro-experts of a layer (shared
ones first).

With a the hidden state of channel k of expert e, w its down column, g = dL/df_e the gradient at the
expert's output before the router weight, and G_e the mean of g gᵀ over the n_e tokens routed to e,
the official code (LLIKKE/HEAPr at 9c101aa) scores

    s_ek = (1/n_e Σ_t a_tk²) · w_kᵀ G_e w_k

and removes the lowest over all layers together, from routed experts only. The paper has an
additional factor of one half. Since w_k · g_t is the derivative of the loss by a_tk, the second
factor is the mean of its square, and no [D, D] matrix is needed:

    s_ek = mean_t a_tk² · mean_t (dL/da_tk)²

Unlike in CAMERA's energy, both are means over routed tokens, so the channels of rarely used experts
do not score low for that reason. The loss is a mean over tokens in the official code and a sum
here, which changes all scores by the same factor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from bench.errors import UserError
from bench.method import Context, InputSize, MethodReport, MethodWork
from bench.models.expert_hooks import observe_experts
from bench.models.model import Model
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import MoEBlock
from bench.ui import Progress
from methods.moe.calibration import (
    CalibratedPruning,
    NullObserver,
    backpropagate_loss,
    enable_gradients,
    require_finite,
)
from methods.moe.micro_experts import expert_spans, expert_view
from methods.moe.pruning import (
    MicroExpertPruning,
    refuse_offloaded,
    require_calibration,
    require_routed_room,
)
from methods.moe.ranking import energy_share, lowest, lowest_overall


class HiddenGradients(NullObserver):
    """Sums a² and (dL/da)² of every routed micro-expert of a block over its tokens."""

    def __init__(self, block: MoEBlock) -> None:
        device = expert_view(block, 0).down.device
        self._block, self._places = block, dict(expert_spans(block))
        self._square_N = torch.zeros(block.micro_experts, dtype=torch.float64, device=device)
        self._slope_N = torch.zeros_like(self._square_N)
        self._tokens_N = torch.zeros_like(self._square_N)

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one expert, and their gradients during the backward pass."""
        place = self._places[expert]
        self._square_N[place] += hidden_SF.detach().double().square().sum(0)
        self._tokens_N[place] += len(hidden_SF)

        def add(gradient_SF: Tensor) -> None:
            self._slope_N[place] += gradient_SF.double().square().sum(0)

        hidden_SF.register_hook(add)

    def scores(self) -> Tensor:
        """Return s, float64 [N]; inf for shared micro-experts, 0 for experts without tokens."""
        tokens_N = self._tokens_N.clamp_min(1)
        score_N = self._square_N / tokens_N * (self._slope_N / tokens_N)
        require_finite(self._block, score_N)
        # Shared micro-experts are never removed.
        score_N[: self._block.d_shared] = torch.inf
        return score_N


class Heapr(MicroExpertPruning, CalibratedPruning):
    """Remove the routed micro-experts of least score, measured on the unpruned model.

    `scope` ranks over the whole model (`global`, as published) or within every `layer`. The ratio
    includes shared experts, so that methods are compared at equal size; in the paper it refers to
    routed micro-experts only.
    """

    state: Literal["zeroed", "removed"] = "removed"
    scope: Literal["global", "layer"] = "global"

    def check(self, structure: ModelStructure) -> None:
        """Also refuse a ratio that routed experts alone cannot reach, and experts in a list."""
        super().check(structure)
        blocks = self.blocks(structure)
        require_routed_room(blocks, self.budgets(structure), self.ratio)
        for block in blocks:
            if block.layout in ("list", "flat"):
                raise UserError(
                    "Heapr needs gradients of the experts' hidden states, which cannot be observed "
                    f"in {block.name}: choose camera_p or camera_loss_aware"
                )

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Add the backward pass, in which no weight gets a gradient."""
        return replace(super().work(structure, inputs), logits=1.0, backwards=0.5)

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Run one forward and backward pass per row, rank and remove."""
        calibration = require_calibration(context)
        structure = model.structure
        blocks = structure.micro_expert_blocks
        refuse_offloaded(blocks)
        scores = self._scores(model, calibration.tokens, context.progress)
        budgets = self.budgets(structure)
        if self.scope == "global":
            chosen = lowest_overall(scores, sum(budgets))
        else:
            chosen = [lowest(score_N, n) for score_N, n in zip(scores, budgets, strict=True)]
        layers = []
        for block, score_N, indices in zip(blocks, scores, chosen, strict=True):
            here = indices.to(score_N.device)
            routed_N = score_N.nan_to_num(posinf=0.0)
            share = energy_share(routed_N, here)
            layers.append(self.remove_micro_experts(block, here) | {"removed_score_share": share})
        return self.build_report(
            model,
            structure,
            layers,
            scope=self.scope,
            calibration=calibration.fingerprint,
            tokens=calibration.tokens.numel(),
        )

    def _scores(self, model: Model, tokens_BL: Tensor, progress: Progress) -> list[Tensor]:
        """Return every block's scores, float64 [N]."""
        observers = {block: HiddenGradients(block) for block in model.structure.micro_expert_blocks}
        with enable_gradients(model.network), observe_experts(observers, self.chunk):
            # One row at a time, because its activations are kept until its backward pass.
            for row_1L in progress.track(tokens_BL.split(1), "computing gradients of the loss"):
                backpropagate_loss(model.network, row_1L)
        return [found.scores() for found in observers.values()]
