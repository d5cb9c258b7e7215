"""Record of one run: its inputs and its results. Written once, never changed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
)

from bench.method import Effect, LayerReport
from bench.records.leaves import ConfigLeaves, EnvironmentLeaves, ProvenanceLeaves, with_leaves
from bench.records.leaves import JsonObject as JsonObject  # noqa: PLC0414  # part of this module's interface

SCHEMA = 3
ID_DIGITS = 12
EFFECTS_WITHOUT_SAVING = frozenset({"zeroed", "masked"})
UNCONFIRMED = "unconfirmed"
"""Replaces the effect that a method reports if the counts contradict it."""
BUILT_SOURCES = re.compile("(fresh|torchvision):.*|module")
"""Sources of networks that are built from code; their weights are random unless a path is given."""
AVERAGE = "average"
"""Task name of the metric that is the mean of a benchmark's headline metrics."""
LARGEST_WHOLE_FLOAT = 2**53
How = Literal["counted", "measured", "analytic"]
"""How a cost was obtained."""


def utc_now() -> str:
    """Return the current time as records store it: ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class _FrozenModel(BaseModel):
    # An unknown key means a newer program or a damaged file, so it is refused instead of dropped.
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


class SizeAndWork(_FrozenModel):
    """Size and work of a network: numbers of parameters, bytes, and FLOPs of one forward.

    `packed` is the number of parameters in packed storage. `held` is the number of floating-point
    values that modules store outside parameters and packed storage, and `padding` the number of
    parameters that only pad storage; both are 0 in older records. `nonzero` counts the nonzero
    values among all of them; it is None for offloaded weights and in older records. `flops` is None
    if it cannot be counted, for the `reason` given.
    """

    parameters: int
    packed: int
    bytes: int
    flops: float | None
    reason: str | None = None
    held: int = 0
    padding: int = 0
    nonzero: int | None = None

    @property
    def numbers(self) -> int:
        """Number of weights, including those moved to buffers and excluding padding."""
        return self.parameters - self.padding + self.held

    @property
    def zero_share(self) -> float | None:
        """Share of the weights that are zero; None if zeros were not counted."""
        counted = self.nonzero is not None and self.numbers > 0
        return 1 - (self.nonzero or 0) / self.numbers if counted else None


class EffectCheck(_FrozenModel):
    """Check of the effect that a method reports against counts before and after it.

    `found` is the saving that the counts show, or `none`. `refutation` explains how the counts
    contradict the reported effect; it is None if they do not.
    """

    found: str
    before: SizeAndWork
    after: SizeAndWork
    refutation: str | None = None


class AppliedMethod(_FrozenModel):
    """One applied method: its config, its effect on the weights, and its report.

    `effect` is reported by the method; `check` compares it with counts, and is None in older
    records. `trained` says whether the method fitted weights to data, None if unknown. `layers` is
    the report per layer, `report` everything else. `seconds` is the time to apply the method,
    including calibration. `peak_bytes` is the peak memory during that time, above what was in use
    before; None if it was not measured.
    """

    name: str
    config: JsonObject
    effect: str
    report: JsonObject
    layers: tuple[LayerReport, ...] = ()
    seconds: float
    peak_bytes: int | None = None
    check: EffectCheck | None = None
    trained: bool | None = None

    @property
    def confirmed_effect(self) -> str:
        """The effect shown in reports: `unconfirmed` if unknown or contradicted by the counts."""
        known = self.effect in get_args(Effect)
        refuted = self.check is not None and self.check.refutation is not None
        return self.effect if known and not refuted else UNCONFIRMED

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
            raise ValueError("history is not a list of objects")
        if any(isinstance(value, str | list | dict) for line in lines for value in line.values()):
            raise ValueError("history contains values that are not numbers")
        return report


class Metric(_FrozenModel):
    """One metric of a task, with everything needed to compare it with another one.

    `headline` marks the single metric that represents its task; `split` and `filter` are the
    harness's names. For task `average`, `n` is the number of averaged tasks, and `missing` the
    total number of their samples without an answer. `truncated` is the number of documents that
    lost tokens on the left, None if they were not counted.

    `value` is computed over the samples with an answer; `missing` is the number of samples without
    one. The value is None if `missing` exceeds what `benchmark.allow_missing` accepts.
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
    truncated: int | None = None
    missing: int = Field(default=0, ge=0)


class TaskEvidence(_FrozenModel):
    """Facts about the prompts and answers of one task, as numbers of documents.

    `truncated` documents lost tokens on the left of a prompt, at most `longest_cut` each. In
    `spanning` documents a token contains the end of the prompt and the start of the answer. In
    `tied` documents several choices share the highest likelihood. In `repeated_examples` the
    question is also one of the few-shot examples. `generation` holds the generation settings in
    use, None if nothing is generated.
    """

    task: str
    documents: int
    truncated: int = 0
    longest_cut: int = 0
    spanning: int = 0
    tied: int = 0
    repeated_examples: int = 0
    generation: JsonObject | None = None


class Cost(_FrozenModel):
    """One cost: what it refers to (`scope`), quantity, unit, value, and how it was obtained.

    `parts` holds its components or related values; `note` is a caveat for the reader, such as a
    busy machine.
    """

    scope: str
    quantity: str
    unit: str
    value: float
    how: How
    parts: dict[str, float] = Field(default_factory=dict)
    note: str | None = None


class MissingMeasurement(_FrozenModel):
    """One missing number with its reason, recorded instead of a zero.

    `scope` and `quantity` are those of a cost, or the task and the metric of a headline.
    `how` names the method that failed if the quantity can be obtained in several ways, else None.
    """

    scope: str
    quantity: str
    reason: str
    how: How | None = None


class EstimatedPhase(_FrozenModel):
    """Estimate of one phase, made before the run: lower and upper bound in seconds.

    `phase` is the name of the phase in the measured times, `bound_by` the resource that limits its
    speed, and `peak_bytes` the peak memory of the device.
    """

    phase: str
    low: float
    high: float
    bound_by: str
    peak_bytes: float


class Record(_FrozenModel):
    """One run; `id` is a hash of its inputs, see `run_id`.

    `kept_weights` is the hash of the network saved beside the record, None if none was saved.
    `estimate` was made before the run; it is empty if there was none.
    """

    # With every change of the fields, increase SCHEMA and add the old form to `record_file.py`.
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
    evidence: tuple[TaskEvidence, ...] = ()
    provenance: JsonObject
    kept_weights: str | None = None
    estimate: tuple[EstimatedPhase, ...] = ()

    @field_validator("config")
    @classmethod
    def _config_fits_reports(cls, config: JsonObject) -> JsonObject:
        return with_leaves(config, ConfigLeaves)

    @field_validator("provenance")
    @classmethod
    def _provenance_fits_reports(cls, provenance: JsonObject) -> JsonObject:
        return with_leaves(provenance, ProvenanceLeaves)

    @field_validator("environment")
    @classmethod
    def _environment_fits_reports(cls, environment: JsonObject) -> JsonObject:
        return with_leaves(environment, EnvironmentLeaves)

    @property
    def drawn(self) -> bool:
        """Whether the weights before all methods were drawn at random, with the run's seed."""
        path = self.config.get("model", {}).get("path")
        return path is None and BUILT_SOURCES.fullmatch(self.model.source) is not None

    @property
    def untrained(self) -> bool:
        """Whether the scored weights were drawn at random and no method trained them."""
        # Records without `trained` are from versions whose methods for random weights all trained
        # them.
        return self.drawn and all(method.trained is False for method in self.methods)

    @property
    def marks(self) -> tuple[str, ...]:
        """Warnings that are shown wherever the run's numbers are shown."""
        unconfirmed = without_real_saving(self.methods) == UNCONFIRMED
        marks = {"untrained": self.untrained, UNCONFIRMED: unconfirmed}
        return tuple(mark for mark, is_set in marks.items() if is_set)

    @property
    def is_dense(self) -> bool:
        """Whether the run is a baseline for compressed ones: trained and not compressed.

        For a model with random initial weights, this is a run that only trains.
        """
        if self.drawn:
            unchanged = all(method.effect == "none" for method in self.methods)
            return unchanged and not self.untrained
        return not self.methods

    @property
    def family(self) -> str:
        """The methods' names without ratios, or `dense`; marked if the weights are untrained."""
        names = ["dense"] if self.is_dense else [method.name for method in self.methods]
        return " + ".join(_marked(names, untrained=self.untrained))

    @property
    def label(self) -> str:
        """Name of the run in tables: its methods with their ratios, such as `camera_p 0.4`."""
        names = [method_label(m.name, m.config) for m in self.methods] or ["dense"]
        return " + ".join(_marked(names, untrained=self.untrained))

    def __repr__(self) -> str:
        """Return one line, because all fields of a record fill pages."""
        from bench.records.display import record_line

        return record_line(self)

    __str__ = __repr__

    def _repr_html_(self) -> str:
        from bench.records.display import record_html

        return record_html(self)

    def metric(self, task: str) -> Metric | None:
        """Return the headline metric of a task, or None if the run did not score it."""
        return next((m for m in self.metrics if m.task == task and m.headline), None)

    def missing_cost(self, quantity: str, scope: str) -> MissingMeasurement | None:
        """Return the entry of a missing cost, or None if it was obtained or not requested."""
        found = (m for m in self.missing if m.quantity == quantity and m.scope == scope)
        return next(found, None)

    def cost(self, quantity: str, scope: str = "model") -> Cost | None:
        """Return one cost of this run, or None if it was not obtained."""
        costs = (c for c in self.headline_costs if (c.scope, c.quantity) == (scope, quantity))
        return next(costs, None)

    @property
    def headline_costs(self) -> list[Cost]:
        """One cost per scope and quantity; counted and measured values precede analytic ones."""
        found: dict[tuple[str, str], Cost] = {}
        for cost in self.costs:
            known = found.get((cost.scope, cost.quantity))
            # Formulas cover only the changes that slimbench's own methods make, counts those of any
            # method. So an analytic value never replaces another one, whatever their order.
            if known is None or (known.how == "analytic" and cost.how != "analytic"):
                found[cost.scope, cost.quantity] = cost
        return list(found.values())


def check_ratio(ratio: object) -> None:
    """Raise `ValueError` unless a method's ratio is a single number or missing.

    Tables are sorted by the ratio and labels show it, so a list of ratios needs another name.
    """
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float)):
        raise ValueError(f"ratio={ratio} is not one number")
    # The index and plots store ratios as floats, which cannot represent all larger integers.
    if isinstance(ratio, int) and abs(ratio) > LARGEST_WHOLE_FLOAT:
        raise ValueError(f"ratio={ratio}: whole numbers go up to {LARGEST_WHOLE_FLOAT}")


def without_real_saving(methods: Sequence[AppliedMethod]) -> str | None:
    """Return the effect (`masked`, `zeroed`) if computation still uses all weights, else None.

    A run with such methods only may not claim a gain in time or memory. Neither may a run with an
    effect that the counts contradict (`unconfirmed`), whatever its other methods do.
    """
    # A dict instead of a set keeps the order in which methods were applied.
    effects = dict.fromkeys(method.confirmed_effect for method in methods)
    if UNCONFIRMED in effects:
        return UNCONFIRMED
    return "+".join(effects) if effects and effects.keys() <= EFFECTS_WITHOUT_SAVING else None


def lost_zeros(methods: Sequence[AppliedMethod]) -> dict[str, str]:
    """Return a sentence per `zeroed` method whose zeros were mostly filled or removed, by name.

    For example, a later quantizer whose grid has no zero, or a later least-squares fit, stores
    other values in place of the zeros.
    """
    found = {}
    for place, method in enumerate(methods):
        if method.confirmed_effect != "zeroed" or method.check is None:
            continue
        before, after = method.check.before.zero_share, method.check.after.zero_share
        for later in methods[place + 1 :]:
            left = None if later.check is None else later.check.after.zero_share
            if before is None or after is None or left is None or left >= (before + after) / 2:
                continue
            found[method.name] = (
                f"{later.name} leaves few of the zeros of {method.name}: {100 * after:.1f} % of "
                f"the weights are zero before and {100 * left:.1f} % after"
            )
            break
    return found


def standing_effects(methods: Sequence[AppliedMethod]) -> list[str]:
    """Return the distinct effects that remain after the last method, in order of application."""
    lost = lost_zeros(methods)
    left = (method.confirmed_effect for method in methods if method.name not in lost)
    return [effect for effect in dict.fromkeys(left) if effect != "none"]


def run_id(inputs: JsonObject) -> str:
    """Return the first 12 hex digits of the checksum of the inputs."""
    # 48 bits: even among a million runs the chance of a collision is about 0.2 %.
    return checksum(inputs)[:ID_DIGITS]


def checksum(content: JsonObject) -> str:
    """Return the SHA-256 of the canonical JSON of `content`."""
    # Sorted keys, fixed separators and ASCII make the text independent of insertion order and
    # platform; any change here would change the id of every run.
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _marked(names: list[str], *, untrained: bool) -> list[str]:
    """Put `untrained` before the names, or in place of `dense`."""
    if not untrained:
        return names
    return ["untrained", *(name for name in names if name != "dense")]


def method_label(name: str, config: Mapping[str, Any]) -> str:
    """Return a method with its ratio if it has one, such as `camera_p 0.4`."""
    ratio = config.get("ratio")
    return name if ratio is None else f"{name} {ratio:g}"
