"""Names of stages, the measured pair of models, and the report of costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from bench.records.record import Cost, MissingMeasurement

if TYPE_CHECKING:
    from torch import nn

    from bench.models.model import Model


COST_QUANTITIES = (
    "parameters", "nonzero_parameters", "active_parameters", "bytes", "disk_bytes", "peak_bytes",
    "cache_bytes", "cache_bytes_per_token", "side_cache_bytes", "flops", "flops_causal",
    "visual_flops", "macs", "method_flops", "seconds", "method_seconds", "wall", "latency",
    "method_latency", "speedup", "realised_speedup_fraction", "energy", "energy_saved",
    "roofline_efficiency", "matrix_rate", "copy_bandwidth",
)  # fmt: skip
"""Scopes and quantities of costs, as a search may name them."""
COUNTED_PREFIXES = ("flops_", "macs_")
"""Prefixes of names of counts that contain a convention or a part."""


Measurements: TypeAlias = "Iterator[Cost | MissingMeasurement]"


@dataclass
class CostReport:
    """Obtained costs and missing measurements."""

    costs: list[Cost] = field(default_factory=list)
    missing: list[MissingMeasurement] = field(default_factory=list)

    def add(self, rows: Iterable[Cost | MissingMeasurement]) -> None:
        """Add each row to `costs` or `missing`, in the given order."""
        for row in rows:
            if isinstance(row, Cost):
                self.costs.append(row)
            else:
                self.missing.append(row)


PREFILL, FIRST_TOKEN, DECODE, END_TO_END = "prefill", "first token", "decode", "end to end"
FORWARD = "forward"
STAGES = (FORWARD, PREFILL, FIRST_TOKEN, DECODE, END_TO_END)


@dataclass(frozen=True)
class MeasuredPair:
    """A model, its dense baseline if there is one, and why no gain may be reported.

    `no_gain_reason` is the effect of methods that keep all weights (`masked`, `zeroed`), or the
    reason why there is no dense model. It is None if gains are real or nothing is compared.
    """

    model: Model
    dense: Model | None = None
    no_gain_reason: str | None = None

    @property
    def networks(self) -> list[nn.Module]:
        """The model's network, followed by the dense one if there is one."""
        # Measurements per network rely on this order: index 1 is the baseline.
        return [self.model.network, *([self.dense.network] if self.dense else [])]
