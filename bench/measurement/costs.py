"""The costs of a run, as rows for its record."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from bench.measurement.config import CostsConfig
from bench.measurement.flops import count_forward, count_images
from bench.measurement.size import size
from bench.models.vision import Classifier

if TYPE_CHECKING:
    from torch import nn

    from bench.models.model import Model


@dataclass(frozen=True)
class Cost:
    """One number of cost: what of, which quantity, its unit, and how it was had."""

    scope: str
    quantity: str
    unit: str
    value: float
    how: Literal["counted", "measured", "analytic"]
    parts: dict[str, float] = field(default_factory=dict)


def count(model: Model, config: CostsConfig) -> list[Cost]:
    """Count a model's size and the FLOPs of one forward at the config's shapes."""
    counted = size(model.network, model.anatomy)
    other = counted.parameters - counted.routed - counted.shared
    parts = {"routed": counted.routed, "shared": counted.shared, "other": other}
    flops, shapes = _forward(model.network, config)
    total = flops.pop("total")
    return [
        Cost("model", "parameters", "1", counted.parameters, "counted", dict(parts)),
        Cost("model", "nonzero_parameters", "1", counted.nonzero, "counted"),
        Cost("model", "active_parameters", "1", counted.active, "analytic"),
        Cost("model", "bytes", "B", counted.bytes, "counted"),
        Cost(shapes, "flops", "FLOP", total, "counted", {k: float(v) for k, v in flops.items()}),
        Cost(shapes, "macs", "MAC", total / 2, "counted"),
    ]


def _forward(network: nn.Module, config: CostsConfig) -> tuple[dict[str, int], str]:
    """Count the FLOPs of one forward; the shapes name what went in, text or images."""
    if isinstance(network, Classifier):
        size = network.config.size
        shapes = f"forward {config.batch}x{network.config.channels}x{size}x{size}"
        return count_images(network, config.batch), shapes
    shapes = f"forward {config.batch}x{config.length}"
    return count_forward(network, config.batch, config.length), shapes


def phases(seconds: dict[str, float]) -> list[Cost]:
    """Return the wall time of each phase of the run itself."""
    return [Cost(f"phase {name}", "wall", "s", s, "measured") for name, s in seconds.items()]
