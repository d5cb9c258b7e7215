"""The costs of a run, as rows for its record."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from bench.measurement import prefill
from bench.measurement.config import CostsConfig
from bench.measurement.cost import Cost
from bench.measurement.size import size
from bench.measurement.work import flops

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
    timed = _prefill(model, config) if model.config.kind == "image_text" else []
    return [*sizes, *flops(model, config), *timed]


def _prefill(model: Model, config: CostsConfig) -> list[Cost]:
    """Time one prompt with an image."""
    inputs = prefill.prompt(model, config.words)
    scope, found = prefill.lengths(model, inputs).scope, prefill.measure(model, inputs)
    costs = [
        Cost(scope, "cache_bytes", "B", found.cache_bytes, "counted"),
        Cost(scope, "seconds", "s", found.median, "measured", _spread(found.seconds)),
    ]
    if found.overhead:
        middle, spread = statistics.median(found.overhead), _spread(found.overhead)
        costs.append(Cost(scope, "method_seconds", "s", middle, "measured", spread))
    return costs


def _spread(seconds: list[float]) -> dict[str, float]:
    """Return the fastest and the slowest of some repetitions."""
    return {"least": min(seconds), "most": max(seconds)}


def phases(seconds: dict[str, float]) -> list[Cost]:
    """Return the wall time of each phase of the run itself."""
    return [Cost(f"phase {name}", "wall", "s", s, "measured") for name, s in seconds.items()]
