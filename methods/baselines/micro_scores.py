"""Controls that rank micro-experts by one factor of CAMERA's energy.

Shapes: N micro-experts of a layer (shared ones first).

With φ the coefficients and w the down columns of `methods.camera.energy`, the energy at α = 0 is
‖φ‖₂² · ‖w‖₂²; each factor alone is a control for the other.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from bench.method import Context, MethodReport
from bench.models.anatomy import MoEBlock
from bench.models.model import Model
from methods.activations import Activations
from methods.camera.energy import column_norms
from methods.camera.ranking import lowest
from methods.micro_experts import spans, view
from methods.micro_pruning import MicroPruning
from methods.moe_pruning import calibration_of, refuse_offloaded
from methods.walking import Walker, refuse_nan


class Magnitude(MicroPruning):
    """Remove the micro-experts whose down column has the smallest norm ‖w‖₂."""

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Rank within every layer; no calibration."""
        anatomy = model.anatomy
        refuse_offloaded(anatomy.moe)
        layers = [
            self.take_out(block, lowest(magnitudes(block), budget))
            for block, budget in zip(anatomy.moe, self.budgets(anatomy), strict=True)
        ]
        return self.conclude(model, anatomy, layers)


class ActivationOnly(MicroPruning, Walker):
    """Remove the micro-experts of least ‖φ‖₂², regardless of their down column."""

    uses_calibration: ClassVar[bool] = True

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Measure and rank within every layer."""
        calibration = calibration_of(context)
        anatomy = model.anatomy
        refuse_offloaded(anatomy.moe)
        layers = []
        seen = self.watch(model, calibration.tokens, Activations, context.progress)
        for (block, observer), budget in zip(seen, self.budgets(anatomy), strict=True):
            score_N = observer.square_sum()
            refuse_nan(block, score_N)
            layers.append(self.take_out(block, lowest(score_N, budget)))
        more = {"calibration": calibration.fingerprint, "tokens": calibration.tokens.numel()}
        return self.conclude(model, anatomy, layers, **more)


def magnitudes(block: MoEBlock) -> Tensor:
    """Return ‖w‖₂² of every micro-expert of a block, float64 [N]."""
    # Squared, which ranks like the norm itself and saves a root.
    return torch.cat([column_norms(view(block, expert).down) for expert, _ in spans(block)])
