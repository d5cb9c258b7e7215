"""Loss-aware energy: weighs an error of a block's output by its effect on the loss.

Not in the CAMERA paper; the idea is HEAPr's (arXiv 2509.22299).

Shapes: B rows, L tokens per row, T tokens, D d_model, F an expert's width, N micro-experts of a
layer (shared ones first).

Without micro-expert i the block's output changes by -φ_ti w_i on token t, and the loss, to second
order with the Fisher matrix as its Hessian, by ½ (φ_ti g_tᵀ w_i)², where g_t = ∂L/∂y_t. With the
coefficients taken as independent of the gradients, and the factor ½ omitted, this sums to

    E_i = ‖φ_i‖₂² · w_iᵀ G w_i,   G = mean over t of g_t g_tᵀ

in squared nats. With G = I this is CAMERA's energy at α = 0. Being in units of the loss, energies
of different layers are comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from bench.method import Context, InputSize, MethodReport, MethodWork
from bench.models.model import Model
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import MoEBlock
from bench.ui import Progress
from methods.moe.calibration import (
    Activations,
    CalibratedPruning,
    backpropagate_loss,
    enable_gradients,
    require_finite,
    walk_blocks,
)
from methods.moe.micro_experts import expert_spans, expert_view
from methods.moe.pruning import MicroExpertPruning, refuse_offloaded, require_calibration
from methods.moe.ranking import energy_share, lowest, lowest_overall


def sensitivity(down_DF: Tensor, metric_DD: Tensor) -> Tensor:
    """Return wᵀ G w for every column w of a down matrix, float64 [F]."""
    down_DF = down_DF.double()
    # Σ over rows of w ⊙ (G w): the diagonal of Wᵀ G W without forming it.
    return (down_DF * (metric_DD.double() @ down_DF)).sum(0)


def loss_aware_energy(block: MoEBlock, square_sum_N: Tensor, metric_DD: Tensor) -> Tensor:
    """Return E, float64 [N] in flat order, from Σ_t φ² and G at the block's output."""
    sensitivities = [
        sensitivity(expert_view(block, e).down, metric_DD) for e, _ in expert_spans(block)
    ]
    return square_sum_N.double() * torch.cat(sensitivities)


BlockOutput = Tensor | tuple[Tensor, ...]


class OutputMetric:
    """Accumulates G = mean over tokens of g gᵀ, g the loss gradient at a block's output."""

    def __init__(self, block: MoEBlock) -> None:
        shape = (block.d_model, block.d_model)
        device = expert_view(block, 0).down.device
        self._sum_DD = torch.zeros(shape, dtype=torch.float64, device=device)
        self._tokens = 0

    def add(self, gradient_BLD: Tensor) -> None:
        """Add the gradients of some tokens."""
        gradient_TD = gradient_BLD.flatten(0, -2).float()
        self._sum_DD += gradient_TD.mT @ gradient_TD
        self._tokens += len(gradient_TD)

    def metric(self) -> Tensor:
        """Return G, float64 [D, D], in squared nats over squared activation."""
        return self._sum_DD / max(self._tokens, 1)


def output_metrics(model: Model, tokens_BL: Tensor, progress: Progress) -> dict[MoEBlock, Tensor]:
    """Return G of every block from one forward and backward pass; no weight gets a gradient.

    Rows are processed one at a time, since all activations of a row are kept until its backward
    pass.
    """
    gathered = {block: OutputMetric(block) for block in model.structure.micro_expert_blocks}
    with enable_gradients(model.network), _record_output_gradients(gathered):
        for row_1L in progress.track(tokens_BL.split(1), "computing gradients of the loss"):
            backpropagate_loss(model.network, row_1L)
    return {block: found.metric() for block, found in gathered.items()}


@contextmanager
def _record_output_gradients(gathered: dict[MoEBlock, OutputMetric]) -> Iterator[None]:
    """Accumulate the gradients at the block outputs inside the `with` block."""
    with ExitStack() as stack:
        for block, found in gathered.items():
            handle = block.output_module.register_forward_hook(_gradient_hook(found))
            stack.callback(handle.remove)
        yield


def _gradient_hook(metric: OutputMetric) -> Callable[[nn.Module, object, BlockOutput], None]:
    def after(_: nn.Module, __: object, output: BlockOutput) -> None:
        # Some blocks return their router's logits as well.
        output_BLD = output[0] if isinstance(output, tuple) else output
        # A hook on the tensor, not a module backward hook: no autograd function is wrapped around
        # the block, and the gradient is complete when the hook runs.
        output_BLD.register_hook(metric.add)

    return after


class CameraLossAware(MicroExpertPruning, CalibratedPruning):
    """Remove the micro-experts of least loss-aware energy, measured on the unpruned model.

    `scope` ranks within a `layer`, as CAMERA-P does, or over the whole model (`global`).
    """

    scope: Literal["layer", "global"] = "layer"

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Add the pass for the gradients, in which no weight gets one, and G of every block."""
        walk = super().work(structure, inputs)
        blocks = structure.micro_expert_blocks
        return replace(
            walk,
            forwards=walk.forwards + 1,
            logits=1.0,
            backwards=0.5,
            flops=2.0 * inputs.tokens * sum(block.d_model**2 for block in blocks),
            memory=walk.memory + 8.0 * sum(block.d_model**2 for block in blocks),
        )

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Run one backward pass per row, measure activations once, rank and remove."""
        calibration = require_calibration(context)
        structure = model.structure
        refuse_offloaded(structure.micro_expert_blocks)
        # Everything is measured before anything is removed: G comes from the unpruned model, so the
        # activations must too.
        energies = self._energies(model, calibration.tokens, context.progress)
        chosen = self._choose(energies, self.budgets(structure))
        layers = []
        for block, energy_N, indices in zip(
            structure.micro_expert_blocks, energies, chosen, strict=True
        ):
            here = indices.to(energy_N.device)
            share = energy_share(energy_N, here)
            layers.append(self.remove_micro_experts(block, here) | {"removed_energy_share": share})
        return self.build_report(
            model,
            structure,
            layers,
            scope=self.scope,
            calibration=calibration.fingerprint,
            tokens=calibration.tokens.numel(),
        )

    def _choose(self, energies: list[Tensor], budgets: list[int]) -> list[Tensor]:
        """Return the flat indices to remove from every block."""
        if self.scope == "global":
            # Unlike in CAMERA-P, no division by output power: in units of the loss, energies of
            # different blocks are comparable.
            return lowest_overall(energies, sum(budgets))
        return [lowest(energy_N, n) for energy_N, n in zip(energies, budgets, strict=True)]

    def _energies(self, model: Model, tokens_BL: Tensor, progress: Progress) -> list[Tensor]:
        """Return every block's energies, float64 [N]."""
        metrics = output_metrics(model, tokens_BL, progress)
        energies = []
        for block, activations in walk_blocks(
            model, tokens_BL, Activations, self.walk_options(), progress
        ):
            energy_N = loss_aware_energy(block, activations.square_sum(), metrics[block])
            require_finite(block, energy_N)
            energies.append(energy_N)
        return energies
