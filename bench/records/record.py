"""Everything that one run was and produced. A record is written once and never changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = 2
ID_DIGITS = 12
UNREAL = frozenset({"zeroed", "masked"})

How = Literal["counted", "measured", "analytic"]
"""Which way a number of cost was had."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelPart(_Part):
    """Which network was used, before any method changed it."""

    name: str
    source: str
    revision: str | None
    fingerprint: str
    architecture: str
    parameters: int
    bytes: int


class MethodPart(_Part):
    """One method as applied: its knobs, how its saving is realised, and its own numbers.

    `seconds` is what applying it took, calibration included, `peak_bytes` the memory that this
    needed at most above what was held before; None where memory was not measured.
    """

    name: str
    config: dict[str, Any]
    saving: str
    report: dict[str, Any]
    seconds: float
    peak_bytes: int | None = None


class MetricPart(_Part):
    """One number of accuracy with everything that belongs to its identity."""

    benchmark: str
    task: str
    metric: str
    filter: str
    shots: int
    split: str
    value: float | None
    stderr: float | None
    n: int
    higher_is_better: bool
    headline: bool
    task_version: str | None = None


class CostPart(_Part):
    """One number of cost: what of, which quantity, in which unit, and how it was had.

    `note` is what a reader must know before using it, such as that the machine was loaded.
    """

    scope: str
    quantity: str
    unit: str
    value: float
    how: How
    parts: dict[str, float] = Field(default_factory=dict)
    note: str | None = None


class GapPart(_Part):
    """One number of cost that is not there, and why: never a zero in its place.

    `how` says which way failed where a number can be had in several, None where there is one.
    """

    scope: str
    quantity: str
    reason: str
    how: How | None = None


class Record(_Part):
    """One run. `id` addresses it by the hash of its inputs; see `run_id`."""

    schema_version: int = SCHEMA
    id: str
    status: Literal["done"] = "done"
    started: str
    finished: str
    group: str | None
    command: str
    config: dict[str, Any]
    environment: dict[str, Any]
    model: ModelPart
    methods: tuple[MethodPart, ...]
    metrics: tuple[MetricPart, ...]
    costs: tuple[CostPart, ...]
    gaps: tuple[GapPart, ...] = ()
    provenance: dict[str, Any]

    @property
    def label(self) -> str:
        """The methods with their ratios, as a table names this run: `camera_p 0.4`."""
        if not self.methods:
            return "dense"
        return " + ".join(_label(method) for method in self.methods)

    def metric(self, task: str) -> MetricPart | None:
        """The headline metric of a task, or None when the run did not score it."""
        found = [m for m in self.metrics if m.task == task and m.headline]
        return found[0] if found else None

    def gap(self, quantity: str, scope: str) -> GapPart | None:
        """Why one cost of this run is missing, or None when it is there or was not asked for."""
        found = [g for g in self.gaps if g.quantity == quantity and g.scope == scope]
        return found[0] if found else None

    def cost(self, quantity: str, scope: str = "model") -> CostPart | None:
        """One cost of this run, or None when it was not counted."""
        found = [c for c in self.costs if c.quantity == quantity and c.scope == scope]
        return found[0] if found else None


def unreal(methods: Sequence[MethodPart]) -> str | None:
    """Return the word for weights that are all still computed (`masked`, `zeroed`), else None.

    A run of such methods alone claims no gain in time or memory.
    """
    savings = dict.fromkeys(method.saving for method in methods)
    return "+".join(savings) if savings and savings.keys() <= UNREAL else None


def run_id(inputs: dict[str, Any]) -> str:
    """Return the first 12 hex digits of the checksum of the inputs."""
    return checksum(inputs)[:ID_DIGITS]


def checksum(content: dict[str, Any]) -> str:
    """Return the SHA-256 over the canonical JSON of some content."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _label(method: MethodPart) -> str:
    ratio = method.config.get("ratio")
    return method.name if ratio is None else f"{method.name} {ratio:g}"
