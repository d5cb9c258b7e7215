"""One-shot removal of FFN neurons and heads of dense decoders: FLAP and LLM-Pruner.

Shapes: B rows, L tokens per row, T tokens, U units of a layer, C readout columns, D d_model.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from bench.errors import UserError
from bench.method import (
    ALL_FORMS,
    Context,
    InputSize,
    LayerReport,
    Method,
    MethodReport,
    MethodWork,
    WeightForm,
)
from bench.models.layer_stream import LayerStream
from bench.models.model import Model
from bench.models.offload import is_offloaded
from bench.models.structure.dense_layer import is_transposed, shape_of, weight_of
from bench.models.structure.model_structure import ModelStructure
from bench.ui import Progress
from methods.dense.units import Kind, Units, describe_in_config, find_units, remove_units
from methods.moe.calibration import observe_inputs
from methods.moe.pruning import require_calibration


class StructuredPruning(Method):
    """Base class: score units, and remove the lowest from the network.

    `units` selects neurons, heads or both; in some architectures heads cannot be removed.
    """

    label: ClassVar[str]
    uses_calibration: ClassVar[bool] = True
    accepts: ClassVar[frozenset[WeightForm]] = ALL_FORMS - {"packed"}
    ratio: float = Field(ge=0, lt=1)
    batch: int = Field(default=8, ge=1)
    units: Literal["all", "neurons", "heads"] = "all"

    def check(self, structure: ModelStructure) -> None:
        """Refuse networks whose layers have no such units."""
        self._find(structure)

    def _find(self, structure: ModelStructure) -> list[Units]:
        kinds: tuple[Kind, ...] = ("heads", "neurons") if self.units == "all" else (self.units,)
        return list(find_units(structure, self.label, kinds))

    def _refuse_offloaded(self, model: Model) -> None:
        # Units are removed in memory; offloaded weights would be loaded again unchanged.
        if is_offloaded(model.network):
            raise UserError(
                f"{self.label} needs the weights of the whole model in memory: "
                "set model.device_map=null"
            )

    def _remove(
        self,
        model: Model,
        units: list[Units],
        gone: list[Tensor],
        means: list[Tensor] | None,
        details: dict[str, Any],
    ) -> MethodReport:
        """Remove the marked units, and report what is left of each layer."""
        layers: dict[int, dict[str, Any]] = {}
        removed = 0
        for place, (unit, gone_U) in enumerate(zip(units, gone, strict=True)):
            entry = layers.setdefault(unit.layer, {"layer": unit.layer})
            entry[unit.kind] = unit.count
            entry[f"removed_{unit.kind}"] = int(gone_U.sum())
            removed += int(gone_U.sum()) * unit.weights_per_unit
            if bool(gone_U.any()):
                remove_units(unit, gone_U, None if means is None else means[place])
        if removed:
            describe_in_config(model, units)
        details["removed_weights"] = removed
        reports = [LayerReport.model_validate(entry) for entry in layers.values()]
        return MethodReport("removed" if removed else "none", details, reports)


class Flap(StructuredPruning):
    """FLAP (arXiv 2312.11983): remove the units whose output fluctuates least, and keep their mean.

    The score of a readout column j is var(x_j) · Σ_i W_ij² (WIFV). Scores are standardised per
    layer and kind; for heads they are squared before that and averaged over a head's columns. With
    `allocation=global`, heads and neurons of all layers are ranked together, and each costs its
    number of weights (AL-AM); with `uniform`, each layer loses the share `ratio` of its heads and
    of its neurons (UL-UM). `compensate` adds the mean output of removed units to the readout's
    bias. All statistics are those of the dense model. Every layer keeps at least one unit of each
    kind.
    """

    label: ClassVar[str] = "flap"
    allocation: Literal["global", "uniform"] = "global"
    compensate: bool = True

    def planned_removals(self, structure: ModelStructure) -> list[int] | None:
        """Return the units to remove per layer and kind; None for a global ranking."""
        if self.allocation == "global":
            return None
        units = find_units(structure, self.label)
        return [uniform_count(self.ratio, unit.count) for unit in units]

    @torch.no_grad()
    def apply(self, model: Model, context: Context) -> MethodReport:
        """Measure the inputs of all readouts, rank the units, remove the lowest."""
        calibration = require_calibration(context)
        self._refuse_offloaded(model)
        units = self._find(model.structure)
        moments = readout_moments(model, units, calibration.tokens, self.batch, context.progress)
        scores = [
            fluctuation_scores(u, moment.variance) for u, moment in zip(units, moments, strict=True)
        ]
        if self.allocation == "uniform":
            gone = [lowest(score_U, uniform_count(self.ratio, len(score_U))) for score_U in scores]
        else:
            gone = globally_lowest(scores, [u.weights_per_unit for u in units], self.ratio)
        means = [moment.mean for moment in moments] if self.compensate else None
        details = {
            "requested": {"ratio": self.ratio, "allocation": self.allocation},
            "calibration": calibration.fingerprint,
        }
        return self._remove(model, units, gone, means, details)


class LLMPruner(StructuredPruning):
    """LLM-Pruner (arXiv 2305.11627): remove units by the first-order Taylor term of the loss.

    The score of a unit is the sum of |w · dL/dw| over all of its weights (`param_first`), where L
    is the mean next-token loss over the calibration text. Each pruned layer keeps
    int(count · (1 - ratio)) heads and neurons. The first `protect_first` and last `protect_last`
    layers are not pruned: the release prunes layers 4 to 29 of 32.
    """

    label: ClassVar[str] = "llm_pruner"
    protect_first: int = Field(default=4, ge=0)
    protect_last: int = Field(default=2, ge=0)

    def check(self, structure: ModelStructure) -> None:
        """Refuse networks without such units, or with no layer between the protected ones."""
        super().check(structure)
        protected = self.protect_first + self.protect_last
        if protected >= len(structure.layers):
            raise UserError(
                f"protect_first={self.protect_first} and protect_last={self.protect_last} leave "
                f"none of the {len(structure.layers)} layers of {structure.architecture} to prune: "
                "lower one of them"
            )

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Add the backward pass."""
        work = super().work(structure, inputs)
        return replace(work, logits=1.0, backwards=1.0, together=self.batch)

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Accumulate gradients of the loss, rank units within layers, remove the lowest."""
        calibration = require_calibration(context)
        self._refuse_offloaded(model)
        units = self._find(model.structure)
        scores = taylor_scores(model, units, calibration.tokens, self.batch, context.progress)
        last = len(model.structure.layers) - self.protect_last
        gone = []
        for unit, score_U in zip(units, scores, strict=True):
            inside = self.protect_first <= unit.layer < last
            kept = max(1, int(unit.count * (1 - Fraction(repr(self.ratio)))))
            gone.append(lowest(score_U, unit.count - kept if inside else 0))
        details = {
            "requested": {"ratio": self.ratio},
            "protected_layers": [
                *range(self.protect_first),
                *range(last, len(model.structure.layers)),
            ],
            "calibration": calibration.fingerprint,
        }
        return self._remove(model, units, gone, None, details)


class InputMoments:
    """Mean and sample variance of every input of a projection, [C] in float64."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.total = torch.zeros(columns, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.total)
        self.tokens = 0

    def add(self, x_TC: Tensor) -> None:
        """Add some tokens."""
        x_TC = x_TC.double()
        self.total += x_TC.sum(0)
        self.squares += x_TC.square().sum(0)
        self.tokens += len(x_TC)

    @property
    def mean(self) -> Tensor:
        """Mean over tokens."""
        return self.total / self.tokens

    @property
    def variance(self) -> Tensor:
        """Sample variance over tokens, clamped to 0, below which rounding may take it."""
        centred = self.squares - self.tokens * self.mean.square()
        return centred.clamp(min=0) / max(1, self.tokens - 1)


def readout_moments(
    model: Model, units: list[Units], tokens_BL: Tensor, batch: int, progress: Progress
) -> list[InputMoments]:
    """Return the moments of the inputs of all readouts on the dense model."""
    found = {
        u.readout: InputMoments(shape_of(u.readout)[1], weight_of(u.readout).device) for u in units
    }
    layers = model.structure.layers
    with LayerStream(model.network, layers, tokens_BL, batch) as stream:
        for index in progress.track(range(len(layers)), "measuring units"):
            here = {u.readout: found[u.readout] for u in units if u.layer == index}
            with observe_inputs(here):
                stream.run(index, advance=True)
    moments = [found[unit.readout] for unit in units]
    for unit, moment in zip(units, moments, strict=True):
        if not bool(moment.squares.isfinite().all()):
            raise UserError(
                f"calibration produced NaN or infinite {unit.kind} in layer {unit.layer}: try "
                "model.dtype=float32 or a different text"
            )
    return moments


def fluctuation_scores(units: Units, variance_C: Tensor) -> Tensor:
    """Return the standardised WIFV score of every unit, [U] (FLAP, equations 3 and 6)."""
    metric_C = variance_C * weight_of(units.readout).double().square().sum(0).to(variance_C.device)
    if units.kind == "heads":
        metric_C = metric_C.square()
    spread = metric_C.std() if len(metric_C) > 1 else torch.zeros(())
    # If all scores are equal their standard deviation is 0, and dividing by it would give NaN.
    standard_C = (metric_C - metric_C.mean()) / (spread if float(spread) > 0 else 1)
    score_U: Tensor = standard_C.unflatten(0, (units.count, units.width)).mean(1)
    return score_U


def taylor_scores(
    model: Model, units: list[Units], tokens_BL: Tensor, batch: int, progress: Progress
) -> list[Tensor]:
    """Return Σ |w · dL/dw| over the weights of every unit, [U] each; L is the mean loss."""
    parts = {linear for u in units for linear in (*(s for s, _ in u.sources), u.readout)}
    weights = [cast(nn.Parameter, linear.weight) for linear in parts]
    network: Any = model.network
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for batch_BL in progress.track(tokens_BL.split(batch), "gradients of the loss"):
            rows_BL = batch_BL.to(model.device)
            with torch.enable_grad():
                loss = network(input_ids=rows_BL, labels=rows_BL, use_cache=False).loss
                # All rows have the same length, so the mean over all of them is the mean over
                # batches, weighted by size.
                (loss * (len(rows_BL) / len(tokens_BL))).backward()
        scores = [_taylor(unit) for unit in units]
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None
    for unit, score_U in zip(units, scores, strict=True):
        if not bool(score_U.isfinite().all()):
            raise UserError(
                f"the loss has NaN or infinite gradients in layer {unit.layer}: try "
                "model.dtype=float32 or a different text"
            )
    return scores


@torch.no_grad()
def _taylor(units: Units) -> Tensor:
    total_U = torch.zeros(units.count, dtype=torch.float64)
    for source, unit_R in units.sources:
        total_U.index_add_(0, unit_R, _first_order(source).sum(1))
    term = _first_order(units.readout).sum(0)
    total_U += term.unflatten(0, (units.count, units.width)).sum(1)
    return total_U


def _first_order(linear: nn.Module) -> Tensor:
    """Return |w · dL/dw| of every weight of a projection, float64 [R, C]."""
    gradient = cast(nn.Parameter, linear.weight).grad
    assert gradient is not None
    gradient_RC = gradient.T if is_transposed(linear) else gradient
    return (weight_of(linear).double() * gradient_RC.double()).abs().cpu()


def uniform_count(ratio: float, units: int) -> int:
    """Return how many of a layer's units to remove: the share rounded down, but not all."""
    return min(units - 1, int(Fraction(repr(ratio)) * units))


def lowest(score_U: Tensor, count: int) -> Tensor:
    """Mark the `count` lowest scores; among equal ones the earlier are marked."""
    gone_U = torch.zeros(len(score_U), dtype=torch.bool)
    gone_U[score_U.argsort(stable=True)[:count].cpu()] = True
    return gone_U


def globally_lowest(scores: list[Tensor], costs: list[int], ratio: float) -> list[Tensor]:
    """Mark the units to remove by one ranking over all layers and kinds.

    The threshold is the score at which the total cost of the units down to it is closest to the
    share `1 - ratio` of all; units strictly above it are kept (FLAP's release). The best unit of
    each layer and kind is always kept.
    """
    if ratio == 0:
        return [torch.zeros(len(score_U), dtype=torch.bool) for score_U in scores]
    flat = torch.cat([score_U.cpu() for score_U in scores])
    cost = torch.cat([torch.full((len(s),), float(c)) for s, c in zip(scores, costs, strict=True)])
    order = flat.argsort(descending=True, stable=True)
    spent = cost.double()[order].cumsum(0)
    place = int((spent - float(1 - Fraction(repr(ratio))) * spent[-1]).abs().argmin())
    threshold = flat[order[place]]
    gone = []
    for score_U in scores:
        gone_U = score_U.cpu() <= threshold
        gone_U[score_U.argmax()] = False
        gone.append(gone_U)
    return gone
