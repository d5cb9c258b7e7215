"""Least-squares repair: the kept columns of visual rows compensate for the dropped ones.

If visual rows keep only some heads or neurons of a layer, the remaining columns of its output and
down projections are refitted on calibration images: their product with the dense network's
activations of visual rows should be as close as possible to the product of all columns. The solver
is that of CAMERA-P's refit, whose damping guarantees that the error does not grow. Text rows use
the original weights. This is not part of the paper, and windows are not taken into account.

Shapes: R visual rows of all calibration prompts, F columns of a projection, K kept, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import cast

import torch
from torch import Tensor, nn

from bench.data.prompts import ProcessedPrompts
from bench.method import InputSize, MethodWork
from bench.models.structure.model_structure import ModelStructure
from bench.models.vlm.decoder_view import DecoderLayer, decoder_layers
from bench.ui import Progress
from methods.moe.calibration import Gram, observe_inputs
from methods.moe.least_squares import refit_columns, refit_flops
from methods.visual_engine.decoder import VisualEngine
from methods.visual_engine.settings import RepairedProjections
from methods.visual_engine.weight_slices import head_channels
from methods.visual_tokens.calibration import require_visual_tokens

# Number of layers whose Gram matrices are in memory together. They are F x F in float64, 1 GB per
# feed-forward of a 7B model. Each group of layers takes one pass over the prompts.
LAYERS_AT_ONCE = 4


@torch.no_grad()
def repair_projections(
    engine: VisualEngine, samples: ProcessedPrompts, damping: float, progress: Progress
) -> list[dict[str, object]]:
    """Refit the projections of every layer that visual rows reach, and report the errors.

    The report has, per projection, the squared errors before and after, relative to the output of
    the projection. Experts are left unchanged, since each gets different tokens.

    Raises:
        UserError: a calibration prompt has no image.
    """
    # The last layer before the cut computes only keys and values.
    reached = engine.decoder.layers[: engine.plan.cut - 1]
    repairs: dict[int, RepairedProjections] = {}
    report: list[dict[str, object]] = []
    starts = range(0, len(reached), LAYERS_AT_ONCE)
    for start in progress.track(list(starts), "repairing projections"):
        group = reached[start : start + LAYERS_AT_ONCE]
        grams = _grams(engine, group, samples)
        for layer in group:
            repairs[layer.index], errors = _repair_layer(engine, layer, grams, damping)
            report.append({"layer": layer.index, **errors})
    engine.plan.repair(repairs)
    return report


def with_repair(
    work: MethodWork,
    structure: ModelStructure,
    inputs: InputSize,
    reached: float,
    heads: float,
    neurons: float,
) -> MethodWork:
    """Add a repair to a method's work; the shares are of layers, heads and neurons that stay."""
    layers = decoder_layers(structure)
    layers = layers[: max(0, round(reached * len(layers)) - 1)]
    rows, flops = inputs.rows * inputs.visual, 0.0
    for layer in layers:
        view = layer.attention_view()
        sizes = [(view.heads * view.head_dim, heads)]
        sizes += [] if layer.moe else [(layer.units()[0].width, neurons)]
        for columns, kept in sizes:
            # The Gram matrix is summed in float64, which counts twice.
            flops += 4 * rows * columns**2
            flops += refit_flops(columns, round(kept * columns), view.o.weight.shape[0])
    passes = ceil(len(layers) / LAYERS_AT_ONCE)
    return replace(work, forwards=work.forwards + passes, flops=work.flops + flops)


def _repair_layer(
    engine: VisualEngine, layer: DecoderLayer, grams: dict[nn.Module, Tensor], damping: float
) -> tuple[RepairedProjections, dict[str, list[float]]]:
    weights, errors = engine.weight_cache.layer(layer.index), dict[str, list[float]]()
    view, kept = weights.view, weights.heads.kept
    o_DK, down_DK, places_K = None, None, engine.weight_cache.places(layer)
    if kept and weights.heads.dropped:
        columns_K = head_channels(kept, view.head_dim).to(view.o.weight.device)
        gram_FF = grams[_output_projection(layer)]
        o_DK, errors["attention"] = _refit(gram_FF, view.o.weight, columns_K, damping)
    if places_K is not None and layer.moe is None:
        (unit,) = layer.units()
        columns_K = places_K[0].to(unit.down.device)
        gram_FF = grams[_down_projection(layer)]
        down_DK, errors["feed_forward"] = _refit(gram_FF, unit.down, columns_K, damping)
    return RepairedProjections(
        kept, o_DK, None if places_K is None else places_K[0], down_DK
    ), errors


def _refit(
    gram_FF: Tensor, weight_DF: Tensor, kept_K: Tensor, damping: float
) -> tuple[Tensor, list[float]]:
    """Return the refitted columns and the relative errors before and after."""
    new_DK = refit_columns(gram_FF, weight_DF, kept_K, damping)
    whole = _energy(gram_FF, weight_DF.double())
    errors = []
    for columns_DK in (weight_DF[:, kept_K].double(), new_DK):
        # All columns minus their replacements, which gives the error as a difference of weights.
        left_DF = weight_DF.double().index_add(1, kept_K, -columns_DK)
        errors.append(_energy(gram_FF, left_DF) / whole if whole else 0.0)
    return new_DK.to(weight_DF.dtype), errors


def _energy(gram_FF: Tensor, weight_DF: Tensor) -> float:
    """Return ‖Φ Wᵀ‖² from ΦᵀΦ."""
    return float(((weight_DF @ gram_FF) * weight_DF).sum())


def _grams(
    engine: VisualEngine, layers: Sequence[DecoderLayer], samples: ProcessedPrompts
) -> dict[nn.Module, Tensor]:
    """Return ΦᵀΦ of the inputs of the layers' projections on visual rows, float64 [F, F]."""
    modules = [_output_projection(layer) for layer in layers]
    modules += [_down_projection(layer) for layer in layers if layer.moe is None]
    found = {module: Gram.of_inputs(module, torch.float64) for module in modules}
    for call in samples.inputs:
        tokens = require_visual_tokens(engine, call)
        with engine.dense(), observe_inputs(found, tokens.mask):
            engine.last_logits(call)
    return {module: gram.total for module, gram in found.items()}


def _output_projection(layer: DecoderLayer) -> nn.Module:
    return cast(nn.Module, layer.attention.o_proj)


def _down_projection(layer: DecoderLayer) -> nn.Module:
    return cast(nn.Module, layer.feed_forward.down_proj)
