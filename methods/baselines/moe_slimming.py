"""MoE-Slimming (arXiv 2606.18304): remove channels of routed experts, by budgets of coverage.

Shapes: T tokens of a step, S tokens of one expert, E routed experts, D d_model, F an expert's
width, N micro-experts of a layer (shared ones first).

Channels are ranked within their expert by activity. `coverage_budgets` decides how many of them to
keep: layers whose routed experts contribute more to their output cover more of their activity, and
so do experts whose removal is estimated to cost more. The published results include training with
LoRA afterwards, which is not a part of the method here.

The student is the decoder layer with its routed outputs z_e multiplied by 0.9, the teacher is the
layer itself. The loss is the sum over tokens of ‖student - teacher‖² / (‖teacher‖² + 1e-6) at the
layer's output h. With r the routed sum Σ_e A_e z_e, student - teacher = -0.1 r, so the gradients
that the official code (yifu-ding/MoE-Slimming at ae08eb4) computes by a backward pass are

    dL/dz_e = -0.18 A_e r / (‖h‖² + 1e-6),        ∂²L/∂α_e² = Σ_t 2 A_e² ‖z_e‖² / (‖h‖² + 1e-6)

with α_e the factor of z_e. This holds if the layer adds its block's output to the residual stream,
as in the four models of that code. A layer that normalises the output first (Gemma, OLMo 2) is
scored as if it did not.

The score of an expert estimates the loss without it. To first order it is -dL/dα, which the code
computes as a sum of -z · dL/dz; to second order, ½ ∂²L/∂α² is added (from the authors' answer to a
reviewer; its code is not public, and the same student is assumed). Terms are clipped per output at
the 0.99 quantile of their absolute values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bench.errors import UserError
from bench.method import Context, MethodReport
from bench.models.model import Model
from bench.models.structure.expert_view import ExpertView
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import MoEBlock
from bench.ui import Progress
from methods.baselines.coverage_budgets import (
    expert_weights,
    keep_by_coverage,
    layer_weights,
    rounded_widths,
)
from methods.moe.calibration import (
    CalibratedPruning,
    NullObserver,
    require_finite,
    walk_blocks,
)
from methods.moe.micro_experts import SHARED, expert_spans, expert_view
from methods.moe.pruning import (
    MicroExpertPruning,
    refuse_offloaded,
    require_calibration,
    require_routed_room,
)
from methods.moe.ranking import energy_share, lowest_of_each

Order = Literal["first", "second"]

STUDENT = 0.9
DECAY = 0.9
QUANTILE = 0.99
EPSILON = 1e-6
# Maximum number of elements for torch.quantile.
QUANTILE_LIMIT = 2**24


class Attribution(NullObserver):
    """Scores of one block, as moving averages over steps; a step is one call of the layer.

    `layer_output` ends a step. An average starts with the first step in which the expert has
    tokens; later steps are added with weight 0.1.
    """

    def __init__(self, block: MoEBlock, order: Order = "first") -> None:
        self._block, self._order = block, order
        self._spans = dict(expert_spans(block))
        device = expert_view(block, 0).down.device
        self._channel_N = torch.zeros(block.micro_experts, dtype=torch.float64, device=device)
        self._expert_E = torch.zeros(block.num_experts, dtype=torch.float64, device=device)
        self._steps_E = [0] * block.num_experts
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._tokens = 0
        self._start_step()

    def _start_step(self) -> None:
        self._squares: dict[int, list[Tensor]] = defaultdict(list)  # of each expert, 2 or 3 × [F]
        self._places: dict[int, list[Tensor]] = defaultdict(list)
        self._outputs: dict[int, list[Tensor]] = defaultdict(list)
        self._block_shape: torch.Size | None = None

    def places(self, expert: int, token_S: Tensor) -> None:
        """Store the token indices of the next call of `routed`."""
        self._places[expert].append(token_S)

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Add the tokens of one expert."""
        view = self._block.expert(expert)
        squares = [value.float().square().sum(0) for value in _channels(view, x_SD, hidden_SF)]
        held = self._squares[expert]
        held[:] = [a + b for a, b in zip(held, squares, strict=True)] if held else squares
        output_SD = view.combine(hidden_SF).float() * weight_S.float()[:, None]
        self._outputs[expert].append(output_SD)

    def output(self, y_TD: Tensor) -> None:
        """Store the shape that the layer's output must have."""
        self._block_shape = y_TD.shape

    def layer_output(self, h_TD: Tensor) -> None:
        """Take the layer's output, including the residual, and update all averages.

        Raises:
            UserError: the layer returns several hidden states per token (hyper-connections).
        """
        if h_TD.shape != self._block_shape:
            raise UserError(
                "moe_slimming needs decoder layers with one hidden state per token, but the layer "
                f"of {self._block.name} returns several: choose camera_p"
            )
        routed_TD = torch.zeros_like(h_TD, dtype=torch.float32)
        weight_T = 1 / (h_TD.float().square().sum(1) + EPSILON)
        found = [
            (expert, torch.cat(self._places[expert]), torch.cat(self._outputs[expert]))
            for expert in self._outputs
        ]
        for _, token_S, output_SD in found:
            routed_TD.index_add_(0, token_S, output_SD)
        for expert, token_S, output_SD in found:
            loss_SD = self._effects(output_SD, routed_TD[token_S], weight_T[token_S])
            # The mean over the expert's tokens times their share of all tokens.
            score = clipped_sum(loss_SD).sum() / len(h_TD)
            channel_F = torch.stack([s.sqrt() for s in self._squares[expert]]).mean(0)
            self._update(expert, channel_F, score)
        self._loss += ((1 - STUDENT) ** 2 * routed_TD.square().sum(1) * weight_T).sum()
        self._tokens += len(h_TD)
        self._start_step()

    def _effects(self, output_SD: Tensor, routed_SD: Tensor, weight_S: Tensor) -> Tensor:
        """Return the estimated loss of removing each output of an expert, per token."""
        slope_SD = 2 * STUDENT * (1 - STUDENT) * output_SD * routed_SD
        if self._order == "second":
            slope_SD = slope_SD + output_SD.square()
        return slope_SD * weight_S[:, None]

    def _update(self, expert: int, channel_F: Tensor, score: Tensor) -> None:
        keep = DECAY if self._steps_E[expert] else 0.0
        place = self._spans[expert]
        self._channel_N[place] = keep * self._channel_N[place] + (1 - keep) * channel_F.double()
        self._expert_E[expert] = keep * self._expert_E[expert] + (1 - keep) * score.double()
        self._steps_E[expert] += 1

    def channel_scores(self) -> Tensor:
        """Return the mean norm of each channel's gate, up and hidden state, float64 [N].

        Shared micro-experts get 0.
        """
        return self._channel_N

    def expert_scores(self) -> Tensor:
        """Return the estimated loss per token without each routed expert, float64 [E]."""
        return self._expert_E

    def layer_loss(self) -> float:
        """Return the mean over tokens of the student's relative loss."""
        return float(self._loss) / max(self._tokens, 1)


def _channels(view: ExpertView, x_SD: Tensor, hidden_SF: Tensor) -> list[Tensor]:
    """Return the values of every channel: hidden state, up, and gate before its activation."""
    found = [hidden_SF, functional.linear(x_SD, view.up, view.up_bias)]
    if view.form != "plain":
        found.append(functional.linear(x_SD, view.gate, view.gate_bias))
    return found


def clipped_sum(value_SD: Tensor) -> Tensor:
    """Return Σ_t of values clipped per column at the 0.99 quantile of absolute values, [D].

    With one or two tokens nothing is clipped.
    """
    tokens = len(value_SD)
    if tokens <= 2:
        return value_SD.sum(0)
    columns = max(1, QUANTILE_LIMIT // tokens)
    limits = [part.abs().quantile(QUANTILE, dim=0) for part in value_SD.split(columns, dim=1)]
    limit_D = torch.cat(limits)
    return value_SD.clamp(-limit_D, limit_D).sum(0)


class MoESlimming(MicroExpertPruning, CalibratedPruning):
    """Remove the least active channels of routed experts, under budgets from coverage.

    Widths are multiples of `multiple` (1: any width), and zero or at least `least`. `order` is the
    order of the estimate of an expert's cost. `batch` rows are one step of the moving averages, so
    unlike in other methods it affects the scores. The ratio includes shared experts, so that
    methods are compared at equal size; in the paper it refers to routed channels only.
    """

    state: Literal["zeroed", "removed"] = "removed"
    order: Order = "first"
    multiple: int = Field(default=1, ge=1)
    least: int = Field(default=4, ge=0)
    batch: int = Field(default=2, ge=1)

    def check(self, structure: ModelStructure) -> None:
        """Also refuse a ratio that routed experts alone cannot reach."""
        super().check(structure)
        require_routed_room(self.blocks(structure), self.budgets(structure), self.ratio)

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Measure the unpruned model in one pass, divide the budget, and remove."""
        calibration, structure = require_calibration(context), model.structure
        blocks = structure.micro_expert_blocks
        refuse_offloaded(blocks)
        found = dict(self._observe(model, calibration.tokens, context.progress))
        widths = self.kept_widths(structure, found)
        layers = []
        for block, kept in zip(blocks, widths, strict=True):
            score_N, spans = found[block].channel_scores(), expert_spans(block)
            wanted = {SHARED: block.d_shared, **dict(enumerate(kept))}
            losses = [place.stop - place.start - wanted[expert] for expert, place in spans]
            indices = lowest_of_each(score_N, [place for _, place in spans], losses)
            share = energy_share(score_N, indices)
            entry = self.remove_micro_experts(block, indices)
            layers.append(
                entry
                | {
                    "scores": found[block].expert_scores().tolist(),
                    "layer_loss": found[block].layer_loss(),
                    "removed_score_share": share,
                }
            )
        return self.build_report(
            model,
            structure,
            layers,
            order=self.order,
            calibration=calibration.fingerprint,
            tokens=calibration.tokens.numel(),
        )

    def kept_widths(
        self, structure: ModelStructure, attributions: dict[MoEBlock, Attribution]
    ) -> list[list[int]]:
        """Return the number of channels that every routed expert keeps, per block."""
        routed = [_by_expert(block, attributions[block].channel_scores()) for block in attributions]
        loss_L = torch.tensor([scores.layer_loss() for scores in attributions.values()])
        keep = sum(sum(block.widths) for block in attributions) - sum(self.budgets(structure))
        by_layer = keep_by_coverage(
            [torch.cat(scores) for scores in routed], layer_weights(loss_L), keep
        )
        widths = [
            keep_by_coverage(scores, expert_weights(attributions[block].expert_scores()), count)
            for block, scores, count in zip(attributions, routed, by_layer, strict=True)
        ]
        return rounded_widths(
            widths, [block.widths for block in attributions], self.multiple, self.least
        )

    def _observe(
        self, model: Model, tokens_BL: Tensor, progress: Progress
    ) -> Iterator[tuple[MoEBlock, Attribution]]:
        """Yield every block with its scores, from the unpruned model."""
        decoder_layers = model.structure.layers
        with ExitStack() as stack:

            def observer(block: MoEBlock) -> Attribution:
                found = Attribution(block, self.order)

                def after(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
                    # Some layers return more than hidden states.
                    h_BLD = output[0] if isinstance(output, tuple) else output
                    found.layer_output(h_BLD.flatten(0, -2))

                layer = decoder_layers[block.layer]
                stack.callback(layer.register_forward_hook(after).remove)
                return found

            for block, found in walk_blocks(
                model, tokens_BL, observer, self.walk_options(), progress
            ):
                require_finite(block, found.channel_scores(), found.expert_scores())
                yield block, found


def _by_expert(block: MoEBlock, score_N: Tensor) -> list[Tensor]:
    """Return the scores of each routed expert, on the CPU."""
    return [score_N[place].cpu() for expert, place in expert_spans(block) if expert != SHARED]
