"""Zero single weights of dense decoders: magnitude, Wanda, SparseGPT.

The weights stay in memory as zeros, so these methods claim no gain in time or bytes.

Shapes: T tokens, R rows (outputs), C columns (inputs) of a projection.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
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
    RepeatedStep,
    WeightForm,
)
from bench.models.layer_stream import LayerStream
from bench.models.model import Model
from bench.models.offload import onloaded
from bench.models.structure.dense_layer import is_projection, weight_of
from bench.models.structure.model_structure import ModelStructure
from methods.dense.sparsity import Pattern, magnitude_mask, sparsegpt, wanda_mask
from methods.moe.calibration import Gram, observe_inputs
from methods.moe.pruning import refuse_packed_layer, require_calibration
from methods.moe.quantizer.gptq import COLUMN_OPERATORS, column_walk_flops


@dataclass(frozen=True)
class LinearLayer:
    """One projection of a decoder layer; `name` is relative to the layer."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """The weight [R, C]: a view, so that changes reach the module."""
        return weight_of(self.module)


def linear_layers(layer: nn.Module) -> list[LinearLayer]:
    """Return all projections of a decoder layer: attention and feed-forward."""
    return [
        LinearLayer(name, module) for name, module in layer.named_modules() if is_projection(module)
    ]


def require_dense_decoder(structure: ModelStructure, method: str) -> None:
    """Refuse networks whose weights are not all in linear layers.

    Raises:
        UserError: there are no decoder layers, or some have routed experts or packed weights.
    """
    if not structure.layers:
        raise UserError(f"{method} needs a decoder; {structure.architecture} has no decoder layers")
    if structure.moe:
        raise UserError(
            f"{method} prunes linear layers, but most weights of {structure.architecture} are in "
            "routed experts: choose a dense decoder, or a method for experts such as camera_p"
        )
    for index, layer in enumerate(structure.layers):
        refuse_packed_layer(layer, index)
        if not linear_layers(layer):
            raise UserError(
                f"{method} prunes linear layers, but layer {index} has none: choose another model"
            )


class InputSquares:
    """Σ x² of every input of a projection, [C] in float32."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.total = torch.zeros(columns, dtype=torch.float32, device=device)

    def add(self, x_TC: Tensor) -> None:
        """Add some tokens."""
        self.total += x_TC.float().square().sum(0)


class WeightPruning(Method):
    """Zero the share `ratio` of the weights of every linear layer of every decoder layer.

    Embeddings, norms and the head are not pruned, as in the releases. `pattern` is `unstructured`
    or n:m, which means n zeros in every m consecutive inputs; the ratio must then be n/m.
    """

    label: ClassVar[str]
    accepts: ClassVar[frozenset[WeightForm]] = ALL_FORMS - {"packed"}
    ratio: float = Field(ge=0, lt=1)
    pattern: Literal["unstructured", "2:4", "4:8"] = "unstructured"

    @model_validator(mode="after")
    def _ratio_of_pattern(self) -> WeightPruning:
        pattern = Pattern.parse(self.pattern)
        if pattern is not None and self.ratio != pattern.ratio:
            raise ValueError(
                f"pattern={self.pattern} zeroes {float(pattern.ratio):g} of the weights, but "
                f"ratio={self.ratio:g}: set ratio={float(pattern.ratio):g}"
            )
        return self

    def check(self, structure: ModelStructure) -> None:
        """Refuse MoE models, and input widths that are not a multiple of the pattern's run."""
        require_dense_decoder(structure, self.label)
        pattern = Pattern.parse(self.pattern)
        for index, layer in enumerate(structure.layers):
            for linear in linear_layers(layer):
                columns = linear.weight.shape[1]
                if pattern is not None and columns % pattern.run:
                    raise UserError(
                        f"pattern={self.pattern} needs inputs in multiples of {pattern.run}, but "
                        f"{linear.name} of layer {index} has {columns}: choose another pattern"
                    )

    def _report(self, layers: list[dict[str, int]], fingerprint: str | None) -> MethodReport:
        zeroed = sum(layer["zeroed"] for layer in layers)
        details = {
            "requested": {"ratio": self.ratio, "pattern": self.pattern},
            "zeroed_weights": zeroed,
            "weights": sum(layer["weights"] for layer in layers),
        }
        if fingerprint is not None:
            details["calibration"] = fingerprint
        reports = [LayerReport.model_validate(layer) for layer in layers]
        return MethodReport("zeroed" if zeroed else "none", details, reports)


class WeightMagnitude(WeightPruning):
    """Magnitude pruning per matrix, the control of Wanda's and SparseGPT's papers."""

    label: ClassVar[str] = "weight_magnitude"

    @torch.no_grad()
    def apply(self, model: Model, context: Context) -> MethodReport:
        """Zero the smallest weights of each matrix; no calibration text is read."""
        layers = []
        track = context.progress.track(model.structure.layers, "pruning layers")
        for index, layer in enumerate(track):
            refuse_packed_layer(layer, index)
            with onloaded(layer):
                for linear in linear_layers(layer):
                    weight_RC = linear.weight
                    pattern = Pattern.parse(self.pattern)
                    weight_RC[magnitude_mask(weight_RC, self.ratio, pattern)] = 0
                layers.append(_layer_entry(index, linear_layers(layer)))
        return self._report(layers, None)


class CalibratedWeightPruning(WeightPruning):
    """Prunes each layer on the outputs of the pruned layers before it, as the releases do."""

    uses_calibration: ClassVar[bool] = True
    batch: int = Field(default=8, ge=1)

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Return two passes, as every layer runs again after it is pruned."""
        return MethodWork(forwards=2.0, readings=2.0)

    @torch.no_grad()
    def apply(self, model: Model, context: Context) -> MethodReport:
        """Send the calibration text through the model layer by layer and prune each in turn."""
        calibration = require_calibration(context)
        structure, layers = model.structure, list[dict[str, int]]()
        tokens_BL = calibration.tokens
        with LayerStream(model.network, structure.layers, tokens_BL, self.batch) as stream:
            track = context.progress.track(structure.layers, "pruning layers")
            for index, layer in enumerate(track):
                refuse_packed_layer(layer, index)
                stream.onload_layer(index)
                linears = linear_layers(layer)
                # All projections of a layer are measured before any of them is pruned, which is the
                # default of both releases.
                found = {
                    linear.module: self._statistics(linear.weight.shape[1], linear.weight.device)
                    for linear in linears
                }
                with observe_inputs(found):
                    stream.run(index, advance=False)
                for linear in linears:
                    total = found[linear.module].total
                    if not bool(total.isfinite().all()):
                        raise UserError(
                            f"calibration produced NaN or infinite inputs of {linear.name} in "
                            f"layer {index}: try model.dtype=float32 or a different text"
                        )
                    self._prune(linear.weight, total)
                layers.append(_layer_entry(index, linears))
                if index + 1 < len(structure.layers):
                    stream.run(index, advance=True)
        return self._report(layers, calibration.fingerprint)

    @abstractmethod
    def _statistics(self, columns: int, device: torch.device) -> InputSquares | Gram:
        """Return empty statistics of the inputs of one projection."""

    @abstractmethod
    def _prune(self, weight_RC: Tensor, total: Tensor) -> None:
        """Zero weights of one projection in place, given the total of its statistics."""


class Wanda(CalibratedWeightPruning):
    """Wanda: weights by magnitude times the norm of their input (arXiv 2306.11695)."""

    label: ClassVar[str] = "wanda"

    def _statistics(self, columns: int, device: torch.device) -> InputSquares:
        return InputSquares(columns, device)

    def _prune(self, weight_RC: Tensor, total: Tensor) -> None:
        pattern = Pattern.parse(self.pattern)
        weight_RC[wanda_mask(weight_RC, total.sqrt(), self.ratio, pattern)] = 0


class SparseGPT(CalibratedWeightPruning):
    """SparseGPT (arXiv 2301.00774): zero weights column by column, and compensate in the rest."""

    label: ClassVar[str] = "sparsegpt"
    block: int = Field(default=128, ge=1)

    @model_validator(mode="after")
    def _block_of_whole_runs(self) -> SparseGPT:
        pattern = Pattern.parse(self.pattern)
        if pattern is not None and self.block % pattern.run:
            raise ValueError(
                f"block={self.block} must be a multiple of {pattern.run} for pattern={self.pattern}"
            )
        return self

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Add what GPTQ's walk over the columns of a matrix takes, whose Hessian this shares."""
        shapes = Counter(
            (linear.weight.shape[0], linear.weight.shape[1])
            for layer in structure.layers
            for linear in linear_layers(layer)
        )
        return replace(
            super().work(structure, inputs),
            flops=sum(2 * inputs.tokens * columns**2 * n for (_, columns), n in shapes.items()),
            steps=tuple(self._walk_step(*shape, count) for shape, count in shapes.items()),
            memory=4.0 * max(columns**2 for _, columns in shapes),
        )

    def _walk_step(self, rows: int, columns: int, count: int) -> RepeatedStep:
        def prepare(device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
            weight_RC = torch.randn(rows, columns, device=device).to(dtype)
            x_SC = torch.randn(columns, columns, device=device)
            total_CC = x_SC.T @ x_SC
            return lambda: self._prune(weight_RC, total_CC)

        return RepeatedStep(
            key=f"sparsegpt {rows}x{columns} {self.ratio} {self.pattern} {self.block}",
            times=count,
            prepare=prepare,
            flops=column_walk_flops(rows, columns),
            operators=COLUMN_OPERATORS * columns,
        )

    def _statistics(self, columns: int, device: torch.device) -> Gram:
        return Gram.empty(columns, device)

    def _prune(self, weight_RC: Tensor, total: Tensor) -> None:
        pattern = Pattern.parse(self.pattern)
        weight_RC.copy_(sparsegpt(weight_RC, total, self.ratio, pattern, self.block))


def _layer_entry(index: int, linears: list[LinearLayer]) -> dict[str, int]:
    """Return a report entry with the number of zeros in a layer."""
    return {
        "layer": index,
        "weights": sum(linear.weight.numel() for linear in linears),
        "zeroed": sum(int((linear.weight == 0).sum()) for linear in linears),
    }
