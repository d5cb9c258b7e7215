"""The costs of a run, as rows for its record."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, cast

from bench.measurement import prefill
from bench.measurement.config import CostsConfig
from bench.measurement.cost import Cost
from bench.measurement.flops import count_forward, count_images
from bench.measurement.size import size
from bench.models.vision import Classifier

if TYPE_CHECKING:
    from bench.models.model import Model

__all__ = ["Cost", "count", "phases"]


def count(model: Model, config: CostsConfig) -> list[Cost]:
    """Count a model's size and the FLOPs of one forward at the config's shapes."""
    counted = size(model.network, model.anatomy)
    other = counted.parameters - counted.routed - counted.shared
    parts = {"routed": counted.routed, "shared": counted.shared, "other": other}
    sizes = [
        Cost("model", "parameters", "1", counted.parameters, "counted", dict(parts)),
        Cost("model", "nonzero_parameters", "1", counted.nonzero, "counted"),
        Cost("model", "active_parameters", "1", counted.active, "analytic"),
        Cost("model", "bytes", "B", counted.bytes, "counted"),
    ]
    work = {"causal_lm": _forward, "image_text": _prefill, "image_classifier": _images}
    return [*sizes, *work[model.config.kind](model, config)]


def _forward(model: Model, config: CostsConfig) -> list[Cost]:
    """Count one forward of a language model."""
    flops = count_forward(model.network, config.batch, config.length)
    return _flops(f"forward {config.batch}x{config.length}", flops)


def _images(model: Model, config: CostsConfig) -> list[Cost]:
    """Count one forward of an image classifier, over images of the size that it is built for."""
    network = cast(Classifier, model.network)
    size = network.config.size
    shapes = f"forward {config.batch}x{network.config.channels}x{size}x{size}"
    return _flops(shapes, count_images(network, config.batch))


def _prefill(model: Model, config: CostsConfig) -> list[Cost]:
    """Count and time one prompt with an image."""
    found = prefill.measure(model, prefill.prompt(model, config.words))
    costs = [
        *_flops(found.shapes, found.flops),
        Cost(found.shapes, "cache_bytes", "B", found.cache_bytes, "counted"),
        Cost(found.shapes, "seconds", "s", found.median, "measured", _spread(found.seconds)),
    ]
    if found.overhead:
        middle, spread = statistics.median(found.overhead), _spread(found.overhead)
        costs.append(Cost(found.shapes, "method_seconds", "s", middle, "measured", spread))
    return costs


def _flops(shapes: str, parts: dict[str, int]) -> list[Cost]:
    """Return a count as FLOPs and as multiply-adds."""
    rest = {name: float(value) for name, value in parts.items() if name != "total"}
    return [
        Cost(shapes, "flops", "FLOP", parts["total"], "counted", rest),
        Cost(shapes, "macs", "MAC", parts["total"] / 2, "counted"),
    ]


def _spread(seconds: list[float]) -> dict[str, float]:
    """Return the fastest and the slowest of some repetitions."""
    return {"least": min(seconds), "most": max(seconds)}


def phases(seconds: dict[str, float]) -> list[Cost]:
    """Return the wall time of each phase of the run itself."""
    return [Cost(f"phase {name}", "wall", "s", s, "measured") for name, s in seconds.items()]
