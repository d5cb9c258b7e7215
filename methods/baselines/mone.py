"""MoNE (arXiv 2507.00390): replace experts whose outputs hardly vary by their mean output.

Shapes: T tokens, S tokens of one expert, E routed experts, M replaced ones, D d_model, K experts
per token.

An expert e with outputs z_t on the tokens routed to it is redundant if it is rarely chosen and its
outputs vary little: S_e = √(tr Cov_e) · r_e, with the population covariance of z, and r_e the
router's weight for e averaged over all tokens (0 where it is not chosen). The experts of lowest S
in each layer become "novices", f_e(x) = mean of z, the constant of least squared error. The router
is unchanged, and its weight still multiplies the novice.

The sources are the paper and the authors' code (zxgx/mode-pd @ee6e187), which updates the variance
by a recurrence that omits the first batch. Here means and variances are merged exactly (Chan,
Golub, LeVeque 1983), so that the batch size has no effect.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from bench.errors import UserError
from bench.method import Context, MethodReport, WeightForm
from bench.models.model import Model
from bench.models.replaced_modules import ModuleSpec, ReplacedModule
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import MoEBlock
from bench.models.structure.ragged_experts import RaggedExperts
from methods.moe.calibration import (
    CalibratedPruning,
    NullObserver,
    require_finite,
    walk_blocks,
)
from methods.moe.micro_experts import copy_to_ragged, replace_child
from methods.moe.pruning import LayerEntry, refuse_offloaded, require_calibration


class Mone(CalibratedPruning):
    """Replace whole routed experts by constants, as many in each block as the ratio allows.

    `score` is the published S (`fusion`) or its ablation `output_fluctuation`, the 2-norm of the
    variances without the router's weight. `constant` is `mean` or the ablation `zero`. The
    `d_model` weights of a constant are not subtracted from the ratio.
    """

    accepts: ClassVar[frozenset[WeightForm]] = frozenset({"plain"})

    score: Literal["fusion", "output_fluctuation"] = "fusion"
    constant: Literal["mean", "zero"] = "mean"

    @property
    def leaves(self) -> WeightForm:
        """Some experts become constants."""
        return "novices"

    def check(self, structure: ModelStructure) -> None:
        """Also refuse a ratio that routed experts alone cannot reach."""
        super().check(structure)
        for block, count in zip(structure.moe, self.replaced(structure), strict=True):
            if count >= block.num_experts:
                raise UserError(
                    f"ratio={self.ratio} replaces {count} experts of {block.name}, which has "
                    f"{block.num_experts}: use a lower ratio"
                )

    def replaced(self, structure: ModelStructure) -> list[int]:
        """Return the number of experts to replace per block: the budget in whole experts."""
        budgets = zip(structure.moe, self.budgets(structure), strict=True)
        return [budget // block.d_ff for block, budget in budgets]

    def planned_removals(self, structure: ModelStructure) -> list[int]:
        """Return the micro-experts of the replaced experts, by block."""
        counts = zip(structure.moe, self.replaced(structure), strict=True)
        return [count * block.d_ff for block, count in counts]

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Measure the unmodified model, and replace experts as soon as a block is measured."""
        calibration, structure = require_calibration(context), model.structure
        refuse_offloaded(structure.moe)
        observed = walk_blocks(
            model, calibration.tokens, OutputMoments, self.walk_options(), context.progress
        )
        counts = self.replaced(structure)
        layers = [
            self._replace(block, moments, count)
            for (block, moments), count in zip(observed, counts, strict=True)
        ]
        model.invalidate_structure()
        return self.replacement_report(structure, layers, calibration)

    def _replace(self, block: MoEBlock, moments: OutputMoments, count: int) -> LayerEntry:
        """Replace the experts of lowest score in one block; return its report entry."""
        score_E = moments.fusion() if self.score == "fusion" else moments.fluctuation()
        require_finite(block, score_E, moments.mean_ED)
        # Stable: equal scores, such as those of experts without tokens, are ordered by index.
        gone = sorted(torch.argsort(score_E, stable=True)[:count].tolist())
        entry: LayerEntry = {
            "layer": block.layer,
            "whole_experts": gone,
            "scores": score_E.tolist(),
            "removed_parameters": 0,
        }
        if not gone:
            return entry
        constant_MD = moments.mean_ED[gone]
        if self.constant == "zero":
            constant_MD = torch.zeros_like(constant_MD)
        experts = novice_experts(block, gone, constant_MD)
        entry["removed_parameters"] = _size(block.experts) - _size(experts)
        replace_child(block.block, block.experts, experts)
        return entry


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


class OutputMoments(NullObserver):
    """Mean and variance of each expert's outputs, and sums of router weights, in float64."""

    def __init__(self, block: MoEBlock) -> None:
        shape = (block.num_experts, block.d_model)
        device = block.expert(0).down.device
        self._block = block
        self.mean_ED = torch.zeros(shape, dtype=torch.float64, device=device)
        self._squares_ED = torch.zeros_like(self.mean_ED)  # Σ_t (z_t - mean)²
        self._tokens_E = torch.zeros_like(self.mean_ED[:, 0])
        self._weight_E = torch.zeros_like(self._tokens_E)
        self._all_tokens = 0

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Merge the tokens of one expert."""
        output_SD = self._block.expert(expert).combine(hidden_SF).double()
        before, more = self._tokens_E[expert].clone(), len(output_SD)
        if not more:
            return
        mean_D = output_SD.mean(0)
        apart_D = mean_D - self.mean_ED[expert]
        self._squares_ED[expert] += (output_SD - mean_D).square().sum(0)
        self._squares_ED[expert] += apart_D.square() * before * more / (before + more)
        self.mean_ED[expert] += apart_D * more / (before + more)
        self._tokens_E[expert] += more
        self._weight_E[expert] += weight_S.sum(dtype=torch.float64)

    def output(self, y_TD: Tensor) -> None:
        """Count all tokens of the block."""
        self._all_tokens += len(y_TD)

    def variances(self) -> Tensor:
        """Return the population variance of every output, float64 [E, D]."""
        return self._squares_ED / self._tokens_E.clamp_min(1)[:, None]

    def fusion(self) -> Tensor:
        """Return √(Σ_d var_ed) · Σ_t A_te / T, float64 [E]."""
        return self.variances().sum(1).sqrt() * self._weight_E / max(self._all_tokens, 1)

    def fluctuation(self) -> Tensor:
        """Return the 2-norm of the variances, float64 [E]."""
        return self.variances().square().sum(1).sqrt()


def novice_experts(block: MoEBlock, gone: list[int], constant_MD: Tensor) -> NoviceExperts:
    """Return the experts of a block with those in `gone`, ascending, replaced by constants."""
    views = [block.expert(expert) for expert in range(block.num_experts)]
    nothing = torch.zeros(0, dtype=torch.int64)
    kept = [nothing if expert in gone else None for expert in range(len(views))]
    with torch.no_grad():
        ragged = copy_to_ragged(views, kept, align=1)
    return NoviceExperts(ragged, gone, constant_MD.to(views[0].down.dtype))


class NoviceExperts(ReplacedModule):
    """Routed experts, some of which are constants; called like fused experts."""

    def __init__(self, kept: RaggedExperts, novices: list[int], constant_MD: Tensor) -> None:
        super().__init__()
        self.kept, self.novices = kept, tuple(novices)
        self.constant = nn.Parameter(constant_MD.contiguous(), requires_grad=False)

    def routed_parameters(self) -> tuple[int, int]:
        """Return (parameters of the experts and constants, E)."""
        return _size(self), len(self.kept.widths)

    def spec(self) -> ModuleSpec:
        """Return the spec of the remaining experts, and which experts are constants."""
        return {**self.kept.spec(), "novices": list(self.novices)}

    @classmethod
    def from_spec(cls, spec: ModuleSpec, original: nn.Module) -> Self:
        """Build with zeros, on the current default device and in the default dtype."""
        kept = RaggedExperts.from_spec(spec, original)
        novices = [int(expert) for expert in spec["novices"]]
        return cls(kept, novices, torch.zeros(len(novices), kept.d_model))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, [T, D]."""
        y_TD: Tensor = self.kept(hidden_states, top_k_index, top_k_weights)
        place = {expert: number for number, expert in enumerate(self.novices)}
        # An extra column collects the weights of the remaining experts and is discarded.
        places = [place.get(e, len(place)) for e in range(len(self.kept.widths))]
        column_TK = torch.tensor(places, device=top_k_index.device)[top_k_index]
        weight_TM = top_k_weights.new_zeros(len(y_TD), len(place) + 1)
        weight_TM = weight_TM.scatter_add(1, column_TK, top_k_weights)[:, :-1]
        return y_TD + weight_TM.to(y_TD.dtype) @ self.constant
