"""Baselines with the same bits for all experts: GPTQ, rounding to nearest, and AWQ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import nn

from bench.data.calibration import Calibration
from bench.errors import UserError
from bench.method import Context, InputSize, LayerReport, MethodReport, MethodWork
from bench.models.layer_stream import LayerStream
from bench.models.model import Model
from bench.models.structure.dense_layer import feed_forwards
from bench.models.structure.model_structure import ModelStructure
from bench.models.structure.moe_block import MoEBlock
from bench.ui import Progress
from methods.moe.pruning import refuse_packed, require_calibration
from methods.moe.quantizer.layer_walk import UNQUANTIZED_BITS
from methods.moe.quantizer.method import BitWidth, MoEQuantization
from methods.moe.quantizer.observers import Planner, UniformPlanner
from methods.quantization.channel_scales import (
    ScaleSearch,
    layer_linears,
    observe_layer,
    scale_layer,
    search_work,
)


class Gptq(MoEQuantization):
    """GPTQ (arXiv 2210.17323) with `bits` for every weight of the experts or feed-forwards."""

    bits: BitWidth = 2

    def planners(self, model: Model, context: Context) -> Callable[[MoEBlock], Planner]:
        """Return a factory of planners that use the same bits for all experts."""
        return lambda block: UniformPlanner(block, self.bits, self.group)


class Rtn(Gptq):
    """Rounding to nearest of the weights that GPTQ quantizes, with `bits`; no calibration."""

    uses_calibration: ClassVar[bool] = False

    rounding: Literal["rtn"] = "rtn"


class Awq(Rtn):
    """AWQ (arXiv 2306.00978): scale and clip weights by their inputs, then round to nearest.

    Bits, groups, grids and packing are those of `rtn`. As in the release, scales are searched on
    the outputs of the original layers, not of quantized ones. `clip_weights` also clips, after
    scaling, all matrices except those of queries and keys.
    """

    uses_calibration: ClassVar[bool] = True

    bits: BitWidth = 4
    clip_weights: bool = True

    def check(self, structure: ModelStructure) -> None:
        """Refuse MoE models, in which one norm feeds all experts and the router."""
        if structure.moe:
            raise UserError(
                f"awq folds scales into the norm before a dense feed-forward, but "
                f"{structure.architecture} has experts: use gptq or camera_q"
            )
        super().check(structure)

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Return the pass that observes, the search of every layer, and the rounding at the end."""
        rounded = Rtn.work(self, structure, InputSize())
        work = replace(rounded, forwards=1.0, observed=0.0, readings=rounded.readings + 1)
        for layer in structure.layers:
            bits = {linear: self._bits_of(linear, layer) for linear in layer_linears(layer)}
            searched = {linear: b for linear, b in bits.items() if b != UNQUANTIZED_BITS}
            search = ScaleSearch(searched, self.group, self.clip, self.grid)
            each = search_work(layer, search, inputs, clip_weights=self.clip_weights)
            work = replace(
                work,
                forwards=work.forwards + each.forwards / len(structure.layers),
                flops=work.flops + each.flops,
                elements=work.elements + each.elements,
                operators=work.operators + each.operators,
                memory=max(work.memory, each.memory),
            )
        return work

    @torch.no_grad()
    def apply(self, model: Model, context: Context) -> MethodReport:
        """Scale and clip layer by layer, then quantize the whole network."""
        calibration = require_calibration(context)
        refuse_packed(model.structure.micro_expert_blocks)
        found = list(self._scale_layers(model, calibration, context.progress))
        knobs = {name: getattr(self, name) for name in Rtn.model_fields}
        rounded = Rtn(**knobs).apply(model, context)
        details = rounded.details | {
            "calibration": calibration.fingerprint,
            "tokens": calibration.tokens.numel(),
        }
        layers = [
            LayerReport.model_validate(entry.model_dump() | {"scaled": scaled})
            for entry, scaled in zip(rounded.layers, found, strict=True)
        ]
        return MethodReport(rounded.effect, details, layers)

    def _scale_layers(
        self, model: Model, calibration: Calibration, progress: Progress
    ) -> Iterator[list[dict[str, object]]]:
        """Scale and clip the weights of each layer; yield the exponents found."""
        layers, tokens_BL = model.structure.layers, calibration.tokens
        with LayerStream(model.network, layers, tokens_BL, self.batch) as stream:
            for index, layer in enumerate(progress.track(layers, "searching scales")):
                stream.onload_layer(index)
                bits = {linear: self._bits_of(linear, layer) for linear in layer_linears(layer)}
                bits = {linear: b for linear, b in bits.items() if b != UNQUANTIZED_BITS}
                observed = observe_layer(stream, index, list(bits), tokens_BL.numel())
                search = ScaleSearch(bits, self.group, self.clip, self.grid)
                yield scale_layer(layer, observed, search, clip_weights=self.clip_weights)

    def _bits_of(self, linear: nn.Module, layer: nn.Module) -> int:
        inside = any(linear in part.projections for part in feed_forwards(layer))
        return self.bits if inside else self.attention_bits
