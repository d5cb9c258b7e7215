"""The estimate of a run and of a sweep: times, memory, downloads, tokens, energy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from bench.estimation.hardware import HardwareConfig
from bench.estimation.work import Bound, Time
from bench.records import EstimatedPhase

Recorded = Literal["recorded", "planned before", "new"]
"""Cost category of a run: recorded runs and repeated ones cost nothing."""
USABLE = 0.95
"""Share of a device's memory for tensors; the driver and the allocator need the rest."""


@dataclass(frozen=True)
class PhaseEstimate:
    """Time of one phase and its limiting resource, peak bytes on the device, and tokens."""

    name: str
    kind: str
    low: float
    high: float
    bound_by: Bound
    memory: float
    parts: dict[str, Time]
    given: float = 0.0
    shared: float = 0.0
    sampled: bool = False


@dataclass(frozen=True)
class RunEstimate:
    """Cost of a run on hardware, phase by phase.

    `download` is bytes, None if the hub does not state them. `missing` names what could not be
    estimated, with reasons; the other figures are valid. `cures` are changes with which a run that
    does not fit in memory might fit.
    """

    name: str
    hardware: HardwareConfig
    dtype: str
    phases: tuple[PhaseEstimate, ...]
    download: float | None = 0.0
    missing: tuple[str, ...] = ()
    cures: tuple[str, ...] = ()
    state: Recorded = "new"

    @property
    def low(self) -> float:
        """Lower bound in seconds."""
        return sum(phase.low for phase in self.phases)

    @property
    def high(self) -> float:
        """Upper bound in seconds."""
        return sum(phase.high for phase in self.phases)

    @property
    def memory(self) -> float:
        """Peak bytes on the device during the run."""
        return max((phase.memory for phase in self.phases), default=0.0)

    @property
    def fits(self) -> bool:
        """Whether this memory is available on the device."""
        return self.memory <= USABLE * self.hardware.memory

    @property
    def joules(self) -> tuple[float, float] | None:
        """Lower and upper bound of the energy at the board's stated power, None if not stated."""
        power = self.hardware.power
        return None if power is None else (self.low * power, self.high * power)

    def recorded_phases(self) -> tuple[EstimatedPhase, ...]:
        """Return the phases in the form of a record."""
        return tuple(
            EstimatedPhase(
                phase=phase.name,
                low=phase.low,
                high=phase.high,
                bound_by=phase.bound_by,
                peak_bytes=phase.memory,
            )
            for phase in self.phases
        )


@dataclass(frozen=True)
class SweepEstimate:
    """Estimates of the runs of a sweep, in order; a single run is a sweep of one.

    `whole` is false if only the first runs were estimated.
    """

    runs: tuple[RunEstimate, ...]
    whole: bool = True

    @property
    def to_do(self) -> list[RunEstimate]:
        """The runs without a record, without duplicates."""
        return [run for run in self.runs if run.state == "new"]

    @property
    def low(self) -> float:
        """Lower bound in seconds; models that consecutive runs share are loaded once."""
        return sum(run.low for run in self.to_do) - self._loaded_again("low")

    @property
    def high(self) -> float:
        """Upper bound in seconds."""
        return sum(run.high for run in self.to_do)

    def as_json(self) -> dict[str, object]:
        """Return JSON values: seconds, bytes, tokens and joules."""
        runs = []
        for run in self.runs:
            plain = asdict(run)
            plain["hardware"] = run.hardware.model_dump(mode="json")
            sums = {"low": run.low, "high": run.high, "memory": run.memory, "fits": run.fits}
            runs.append({**plain, **sums, "joules": run.joules})
        return {"low": self.low, "high": self.high, "runs": runs}

    def _loaded_again(self, end: str) -> float:
        saved, before = 0.0, ""
        for run in self.to_do:
            model = run.name.partition(" ")[0]
            if model == before:
                saved += sum(getattr(p, end) for p in run.phases if p.kind == "load")
            before = model
        return saved
