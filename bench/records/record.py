"""Record of one run: its inputs and all that it produced. Written once, never changed."""

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
"""Stands for the effect of a method whose report the counts contradict."""
BUILT_SOURCES = re.compile("(fresh|torchvision):.*|module")
"""Sources of a network that code builds, with weights drawn at random unless a path has some."""
AVERAGE = "average"
"""Stands for the task of a metric that is the mean of a benchmark's headline metrics."""
LARGEST_WHOLE_FLOAT = 2**53
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


class SizeAndWork(_FrozenModel):
    """Counts of a network: parameters, those of them in packed storage, bytes, FLOPs of a forward.

    `held` counts the floating-point numbers that modules hold besides parameters and packed
    storage, `padding` the parameters that only fill storage up; both are 0 in records of older
    programs. `nonzero` counts the numbers of all three kinds that are not zero; None if the weights
    are offloaded, or the program was older. `flops` is None if it cannot be counted; `reason` says
    why.
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
        """Weights in whatever place: one that becomes a buffer is not removed, padding is none."""
        return self.parameters - self.padding + self.held

    @property
    def zero_share(self) -> float | None:
        """Share of these numbers that are zero; None if the zeros were not counted."""
        counted = self.nonzero is not None and self.numbers > 0
        return 1 - (self.nonzero or 0) / self.numbers if counted else None


class EffectCheck(_FrozenModel):
    """What a network's counts before and after a method say about the effect that it reports.

    `found` is the saving that the counts show, or none; `refutation` says how they contradict the
    reported effect, None if they do not.
    """

    found: str
    before: SizeAndWork
    after: SizeAndWork
    refutation: str | None = None


class AppliedMethod(_FrozenModel):
    """One applied method: its config, its effect on the weights, and its own report.

    `effect` is the one that the method reports, `check` what the suite counted; None in records of
    older programs. `trained` says whether it fitted the weights to data, None if that is not known.
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
    check: EffectCheck | None = None
    trained: bool | None = None

    @property
    def confirmed_effect(self) -> str:
        """The effect as reports show it: `unconfirmed` if the counts contradict it."""
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
            raise ValueError("history is no list of objects")
        if any(isinstance(value, str | list | dict) for line in lines for value in line.values()):
            raise ValueError("history holds something else than numbers")
        return report


class Metric(_FrozenModel):
    """One metric of a task, with everything that is needed to compare it with another.

    `headline` marks the single metric that represents its task; `split` and `filter` are the
    harness's names. In the metric of task `average`, `n` is the number of tasks averaged, and
    `missing` the number of rows without an answer in all of them.
    `truncated` counts the documents that lost tokens on the left, None if they were not counted.

    `value` is over the samples that have an answer, `missing` counts those of the task that have
    none. The value is None if they are more than `benchmark.allow_missing` accepts.
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
    """What the numbers of one task rest on, counted over its documents.

    `truncated` documents lost tokens on the left of a prompt, `longest_cut` at most. In `spanning`
    ones a token lies across the join of prompt and answer. `tied` ones have several most likely
    choices. In `repeated_examples` the prompt has the question among its few-shot examples.
    `generation` holds the settings in force, None if nothing is generated.
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
    """One missing number with its reason, recorded instead of a zero.

    `scope` and `quantity` are those of a cost, or the task and the metric of a headline.
    `how` names the method that failed if the quantity can be obtained in several ways, else None.
    """

    scope: str
    quantity: str
    reason: str
    how: How | None = None


class EstimatedPhase(_FrozenModel):
    """What was estimated for one phase before the run: seconds at least and at most.

    `phase` is the name under which its time was then measured, `bound_by` what binds it,
    `peak_bytes` the memory of the device at its peak.
    """

    phase: str
    low: float
    high: float
    bound_by: str
    peak_bytes: float


class Record(_FrozenModel):
    """One run; `id` is a hash of its inputs, see `run_id`.

    `kept_weights` is the hash of the network that lies beside the record, None if none does.
    `estimate` is what was estimated before the run; empty where nothing was.
    """

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
        """Whether the weights that methods found were drawn at random, with the run's seed."""
        path = self.config.get("model", {}).get("path")
        return path is None and BUILT_SOURCES.fullmatch(self.model.source) is not None

    @property
    def untrained(self) -> bool:
        """Whether the scored weights were drawn at random and no method trained them."""
        # A record that does not say whether its methods train is of a time when all that fresh
        # weights were good for did.
        return self.drawn and all(method.trained is False for method in self.methods)

    @property
    def marks(self) -> tuple[str, ...]:
        """Warnings that stand beside the run's numbers wherever they are shown."""
        unconfirmed = without_real_saving(self.methods) == UNCONFIRMED
        marks = {"untrained": self.untrained, UNCONFIRMED: unconfirmed}
        return tuple(mark for mark, is_set in marks.items() if is_set)

    @property
    def is_dense(self) -> bool:
        """Whether the run is what compressed ones are compared with: whole and trained.

        Of a model that begins with random weights, this is a run that only trains.
        """
        if self.drawn:
            whole = all(method.effect == "none" for method in self.methods)
            return whole and not self.untrained
        return not self.methods

    @property
    def family(self) -> str:
        """The methods' names without their ratios; `dense` if the run is, or `untrained`."""
        names = ["dense"] if self.is_dense else [method.name for method in self.methods]
        return " + ".join(_marked(names, untrained=self.untrained))

    @property
    def label(self) -> str:
        """Name of the run in tables: its methods with their ratios, such as `camera_p 0.4`."""
        names = [method_label(m.name, m.config) for m in self.methods] or ["dense"]
        return " + ".join(_marked(names, untrained=self.untrained))

    def _repr_html_(self) -> str:
        from bench.records.display import record_html

        return record_html(self)

    def metric(self, task: str) -> Metric | None:
        """Return the headline metric of a task, or None if the run did not score it."""
        return next((m for m in self.metrics if m.task == task and m.headline), None)

    def missing_cost(self, quantity: str, scope: str) -> MissingMeasurement | None:
        """Return why a cost is missing, or None if it is there or was not requested."""
        found = (m for m in self.missing if m.quantity == quantity and m.scope == scope)
        return next(found, None)

    def cost(self, quantity: str, scope: str = "model") -> Cost | None:
        """Return one cost of this run, or None if it was not obtained."""
        costs = (c for c in self.headline_costs if (c.scope, c.quantity) == (scope, quantity))
        return next(costs, None)

    @property
    def headline_costs(self) -> list[Cost]:
        """One cost per scope and quantity: the counted or measured one before the analytic."""
        found: dict[tuple[str, str], Cost] = {}
        for cost in self.costs:
            known = found.get((cost.scope, cost.quantity))
            # A formula only knows the changes that this repository makes to a network; a count sees
            # those of any method. An analytic value must never replace it, whatever their order.
            if known is None or (known.how == "analytic" and cost.how != "analytic"):
                found[cost.scope, cost.quantity] = cost
        return list(found.values())


def check_ratio(ratio: object) -> None:
    """Raise `ValueError` unless a method's ratio is one number, or missing.

    It is what tables sort by and labels show, so a list of ratios needs a name of its own.
    """
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float)):
        raise ValueError(f"ratio={ratio} is not one number")
    # The index and plots keep ratios as floats, which hold no larger whole number exactly.
    if isinstance(ratio, int) and abs(ratio) > LARGEST_WHOLE_FLOAT:
        raise ValueError(f"ratio={ratio}: whole numbers go up to {LARGEST_WHOLE_FLOAT}")


def without_real_saving(methods: Sequence[AppliedMethod]) -> str | None:
    """Return the effect (`masked`, `zeroed`) if all weights are still computed, else None.

    A run with such methods only may claim no gain in time or memory. Nor may one that has claimed
    a saving which the counts do not show (`unconfirmed`), whatever its other methods do.
    """
    # As a dict instead of a set, to keep the order in which methods were applied.
    effects = dict.fromkeys(method.confirmed_effect for method in methods)
    if UNCONFIRMED in effects:
        return UNCONFIRMED
    return "+".join(effects) if effects and effects.keys() <= EFFECTS_WITHOUT_SAVING else None


def lost_zeros(methods: Sequence[AppliedMethod]) -> dict[str, str]:
    """Return, by name, the methods most of whose zeros a later one filled or removed, and how.

    A quantizer whose grid has no zero, or a least-squares fit, stores other values in their place.
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
    """Return the effects that the network still has after the last method, each once, in order."""
    lost = lost_zeros(methods)
    left = (method.confirmed_effect for method in methods if method.name not in lost)
    return [effect for effect in dict.fromkeys(left) if effect != "none"]


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


def _marked(names: list[str], *, untrained: bool) -> list[str]:
    """Put `untrained` before the names, or in the place of `dense`."""
    if not untrained:
        return names
    return ["untrained", *(name for name in names if name != "dense")]


def method_label(name: str, config: Mapping[str, Any]) -> str:
    """Return a method with its ratio if it has one, such as `camera_p 0.4`."""
    ratio = config.get("ratio")
    return name if ratio is None else f"{name} {ratio:g}"
