"""Counted costs of a model, as entries of a record."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from bench.measurement import prefill
from bench.measurement.config import CostsConfig
from bench.measurement.cost import Cost
from bench.measurement.rows import Found
from bench.measurement.size import size
from bench.measurement.work import flops, flops_of_prompt

if TYPE_CHECKING:
    from bench.models.model import Model

__all__ = ["Cost", "count", "phases"]


def count(model: Model, config: CostsConfig) -> Found:
    """Count a model's size and the FLOPs of one forward at the config's shapes.

    For a vision-language model the prefill of one image prompt is timed as well, and the size of
    its KV cache is recorded.
    """
    found = Found()
    found.add(_sizes(model))
    if model.config.kind != "image_text":
        found.add(flops(model, config))
        return found
    # A vision-language model runs for real: methods that skip visual tokens decide by values, which
    # do not exist on the meta device.
    inputs = prefill.prompt(model, config.words)
    found.add(flops_of_prompt(model, config, inputs))
    found.add(_prefill(model, inputs))
    return found


def _sizes(model: Model) -> list[Cost]:
    counted = size(model.network, model.anatomy)
    other = counted.parameters - counted.routed - counted.shared
    parts = {"routed": counted.routed, "shared": counted.shared, "other": other}
    return [
        Cost("model", "parameters", "1", counted.parameters, "counted", dict(parts)),
        Cost("model", "nonzero_parameters", "1", counted.nonzero, "counted"),
        # Analytic, because it assumes top-k of equally large experts instead of observing routing.
        Cost("model", "active_parameters", "1", counted.active, "analytic"),
        Cost("model", "bytes", "B", counted.bytes, "counted"),
    ]


def _prefill(model: Model, inputs: dict[str, Any]) -> list[Cost]:
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
    return {"least": min(seconds), "most": max(seconds)}


def phases(seconds: dict[str, float]) -> list[Cost]:
    """Return the wall time of each phase of a run as a cost."""
    return [Cost(f"phase {name}", "wall", "s", s, "measured") for name, s in seconds.items()]
