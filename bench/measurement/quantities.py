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
"""What a cost can be of, as a search may name it."""
COUNTED_PREFIXES = ("flops_", "macs_")
"""Beginnings of the names of counts that have a convention or a part in their name."""


Measurements: TypeAlias = "Iterator[Cost | MissingMeasurement]"


@dataclass
class CostReport:
    """Costs that were obtained, and measurements that are missing."""

    costs: list[Cost] = field(default_factory=list)
    missing: list[MissingMeasurement] = field(default_factory=list)

    def add(self, rows: Iterable[Cost | MissingMeasurement]) -> None:
        """Sort each row into `costs` or `missing`, in the order given."""
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
    """A model, its dense baseline if there is one, and the reason why no gain may be reported.

    `no_gain_reason` is the effect of methods that leave all weights in place (`masked`, `zeroed`),
    or the reason why the dense model is missing. It is None if gains are real or nothing is
    compared.
    """

    model: Model
    dense: Model | None = None
    no_gain_reason: str | None = None

    @property
    def networks(self) -> list[nn.Module]:
        """The model's network, followed by the dense one if there is one."""
        # Everything that is measured per network relies on this order: index 1 is the baseline.
        return [self.model.network, *([self.dense.network] if self.dense else [])]
