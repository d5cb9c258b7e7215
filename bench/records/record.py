"""Record of one run: its inputs and all that it produced. Written once, never changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator

from bench.method import LayerReport

SCHEMA = 3
ID_DIGITS = 12
CONFIG_SECTIONS = frozenset(
    {"model", "method", "benchmark", "calibration", "prompts", "costs", "tracker"}
)
EFFECTS_WITHOUT_SAVING = frozenset({"zeroed", "masked"})
JsonObject: TypeAlias = dict[str, Any]
"""A JSON object whose keys are not known here, such as the config of a run or its provenance."""
How = Literal["counted", "measured", "analytic"]
"""How a cost was obtained."""


def utc_now() -> str:
    """Return the time of this moment as records store it: ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class _FrozenModel(BaseModel):
    # An unknown key means a newer program or a damaged file: refuse it instead of dropping it.
    model_config = ConfigDict(extra="forbid", frozen=True)


class DenseModel(_FrozenModel):
    """The network of a run before any method changed it."""

    name: str
    source: str
    revision: str | None
    fingerprint: str
    architecture: str
    parameters: int
    bytes: int


class AppliedMethod(_FrozenModel):
    """One applied method: its config, its effect on the weights, and its own report.

    `layers` holds what it reports per layer, `report` everything else. `seconds` is the time of
    applying it, calibration included. `peak_bytes` is the peak memory of applying it on top of what
    was in use before; None if memory was not measured.
    """

    name: str
    config: JsonObject
    effect: str
    report: JsonObject
    layers: tuple[LayerReport, ...] = ()
    seconds: float
    peak_bytes: int | None = None

    @field_validator("config")
    @classmethod
    def _ratio_is_a_number(cls, config: JsonObject) -> JsonObject:
        check_ratio(config.get("ratio"))
        return config

    @field_validator("report")
    @classmethod
    def _history_is_lines_of_numbers(cls, report: JsonObject) -> JsonObject:
        lines = report.get("history", [])
        if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
            raise ValueError("history is no list of objects")
        if any(isinstance(value, str | list | dict) for line in lines for value in line.values()):
            raise ValueError("history holds something else than numbers")
        return report


class Metric(_FrozenModel):
    """One metric of a task, with everything that is needed to compare it with another.

    `headline` marks the single metric that represents its task; `split` and `filter` are the
    harness's names. In the metric of task `average`, `n` is the number of tasks averaged.
    """

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


class Cost(_FrozenModel):
    """One cost: what it is a cost of (`scope`), quantity, unit, value, and how it was obtained.

    `parts` holds its components or accompanying numbers; `note` is a caveat for the reader, such as
    a loaded machine.
    """

    scope: str
    quantity: str
    unit: str
    value: float
    how: How
    parts: dict[str, float] = Field(default_factory=dict)
    note: str | None = None


class MissingMeasurement(_FrozenModel):
    """One missing cost with its reason, recorded instead of a zero.

    `how` names the method that failed if the quantity can be obtained in several ways, else None.
    """

    scope: str
    quantity: str
    reason: str
    how: How | None = None


class Record(_FrozenModel):
    """One run; `id` is a hash of its inputs, see `run_id`."""

    # Raise SCHEMA, and teach `migrations.py` the old form, with every change of the fields.
    schema_version: int = SCHEMA
    id: str
    status: Literal["done"] = "done"
    started: str
    finished: str
    sweep: str | None
    command: str
    config: JsonObject
    environment: JsonObject
    model: DenseModel
    methods: tuple[AppliedMethod, ...]
    metrics: tuple[Metric, ...]
    costs: tuple[Cost, ...]
    missing: tuple[MissingMeasurement, ...] = ()
    provenance: JsonObject

    @field_validator("config")
    @classmethod
    def _config_has_sections(cls, config: JsonObject) -> JsonObject:
        for name in CONFIG_SECTIONS & config.keys():
            _require_object(config[name], name)
        for name, knobs in config.get("method", {}).items():
            _require_object(knobs, f"method.{name}")
        packages = config.get("packages", [])
        if not isinstance(packages, list):
            raise ValueError("packages is no list")
        benchmark = config.get("benchmark", {})
        if not isinstance(benchmark.get("name"), str):
            raise ValueError("benchmark.name is no text")
        for name in {"perplexity", "data", "metrics", "images"} & benchmark.keys():
            _require_object(benchmark[name], f"benchmark.{name}")
        return config

    @field_validator("provenance")
    @classmethod
    def _sources_are_objects(cls, provenance: JsonObject) -> JsonObject:
        for task, source in _require_object(provenance.get("data") or {}, "data").items():
            _require_object(source, f"data.{task}")
        _require_object(provenance.get("identity") or {}, "identity")
        return provenance

    @field_validator("environment")
    @classmethod
    def _versions_are_an_object(cls, environment: JsonObject) -> JsonObject:
        _require_object(environment.get("versions", {}), "versions")
        return environment

    @property
    def label(self) -> str:
        """Name of the run in tables: its methods with their ratios, such as `camera_p 0.4`."""
        if not self.methods:
            return "dense"
        return " + ".join(_label(method) for method in self.methods)

    def metric(self, task: str) -> Metric | None:
        """Return the headline metric of a task, or None if the run did not score it."""
        found = [m for m in self.metrics if m.task == task and m.headline]
        return found[0] if found else None

    def missing_cost(self, quantity: str, scope: str) -> MissingMeasurement | None:
        """Return why a cost is missing, or None if it is there or was not requested."""
        found = [m for m in self.missing if m.quantity == quantity and m.scope == scope]
        return found[0] if found else None

    def cost(self, quantity: str, scope: str = "model") -> Cost | None:
        """Return one cost of this run, or None if it was not obtained."""
        # A quantity may be both counted and analytic; the counted entry is recorded first.
        found = [c for c in self.costs if c.quantity == quantity and c.scope == scope]
        return found[0] if found else None


def check_ratio(ratio: object) -> None:
    """Raise `ValueError` unless a method's ratio is one number, or missing.

    It is what tables sort by and labels show, so a list of ratios needs a name of its own.
    """
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float)):
        raise ValueError(f"ratio={ratio} is not one number")


def _require_object(value: object, name: str) -> JsonObject:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no object")
    return value


def without_real_saving(methods: Sequence[AppliedMethod]) -> str | None:
    """Return the effect (`masked`, `zeroed`) if all weights are still computed, else None.

    A run with such methods only may claim no gain in time or memory.
    """
    # As a dict instead of a set, to keep the order in which methods were applied.
    effects = dict.fromkeys(method.effect for method in methods)
    return "+".join(effects) if effects and effects.keys() <= EFFECTS_WITHOUT_SAVING else None


def run_id(inputs: JsonObject) -> str:
    """Return the first 12 hex digits of the checksum of the inputs."""
    # 48 bits: even among a million runs a collision has a chance of about 0.2 %.
    return checksum(inputs)[:ID_DIGITS]


def checksum(content: JsonObject) -> str:
    """Return the SHA-256 of the canonical JSON of `content`."""
    # Sorted keys, fixed separators and ASCII make the text independent of insertion order and
    # platform; any change here would change the id of every run.
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _label(method: AppliedMethod) -> str:
    ratio = method.config.get("ratio")
    return method.name if ratio is None else f"{method.name} {ratio:g}"
