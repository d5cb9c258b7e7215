"""The estimate of a run and of a sweep: times, memory, downloads, tokens, energy.

No weight is loaded: networks are on the meta device, and runs of a sweep share what was counted.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal

from bench.errors import UserError, error_sentence
from bench.estimation.hardware import HERE, HardwareConfig
from bench.estimation.phases import Phase, Prompt, Subject, phases_of
from bench.estimation.work import Bound, Time, Work, time_of
from bench.records import EstimatedPhase
from bench.records.index import methods_name

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from bench.config.run_config import RunConfig
    from bench.estimation.layer_timing import StepFigures
    from bench.estimation.network import NetworkWork
    from bench.estimation.tasks import AnswerRecords, TaskDemand
    from bench.evaluation import PlannedBenchmark
    from bench.method import RepeatedStep
    from bench.models.model import Model
    from bench.models.source import ModelSource
    from bench.models.structure.model_structure import ModelStructure

Recorded = Literal["recorded", "planned before", "new"]
"""Cost category of a run: recorded runs and repeated ones cost nothing."""
_USABLE = 0.95
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
        return self.memory <= _USABLE * self.hardware.memory

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


@dataclass(frozen=True)
class Described:
    """A network without weights and its counts, shared by the runs of a sweep."""

    model: Model
    structure: ModelStructure
    work: NetworkWork
    prompt: Prompt | None
    counting_seconds: float
    missing: tuple[str, ...] = ()


class Estimator:
    """Estimates runs; networks, tasks and prompts are reused for later runs.

    With `measures`, layers are timed on this machine, else only earlier measurements are used.
    """

    def __init__(self, hardware: HardwareConfig, *, measures: bool = False) -> None:
        self.hardware = hardware
        self._measures = measures
        self._described: dict[object, Described] = {}
        self._demands: dict[object, tuple[TaskDemand, ...]] = {}
        self._answers: dict[Path, AnswerRecords] = {}

    def estimate(
        self,
        config: RunConfig,
        source: ModelSource,
        benchmark: PlannedBenchmark | None,
        *,
        download: float | None = 0.0,
        missing: Sequence[str] = (),
    ) -> RunEstimate:
        """Return the cost of a run; without a `benchmark`, tasks are left out.

        Raises:
            UserError: the model cannot be described, or the hardware has no rate for the dtype of
                the run.
        """
        hardware = self.hardware
        dtype = _dtype_of(config, hardware)
        hardware.rate(dtype)
        described = self._describe(config, source, dtype)
        gaps = [*missing, *described.missing]
        tasks: tuple[TaskDemand, ...] = ()
        if benchmark is not None:
            tasks, failed = self._tasks(benchmark, described, source)
            gaps += failed
            answers = self._recorded(config.results_dir)
            tasks = answers.applied(tasks, config.model.name, methods_name(config.method))
        untimed = _subject(config, source, described, tasks, hardware, benchmark)
        subject = replace(untimed, figures=self._step_figures(described.model))
        # The limiting resource follows from FLOPs, bytes and operators, even if times were
        # measured.
        prompt = subject.prompt and replace(subject.prompt, seconds=None)
        untimed = replace(untimed, network=replace(subject.network, times=None), prompt=prompt)
        phases = tuple(
            self._timed(phase, plain, phase.dtype or dtype)
            for phase, plain in zip(phases_of(subject), phases_of(untimed), strict=True)
        )
        run = RunEstimate(_name_of(config), hardware, dtype, phases, download, tuple(gaps))
        return run if run.fits else replace(run, cures=tuple(_cures(subject, run)))

    def knows_tokens(self, config: RunConfig, source: ModelSource) -> bool:
        """Return whether tasks can be estimated; for a language model this needs its tokenizer."""
        described = self._describe(config, source, _dtype_of(config, self.hardware))
        return described.model.tokenizer is not None or source.config.kind == "image_classifier"

    def _step_figures(self, model: Model) -> Callable[[RepeatedStep], StepFigures | None]:
        """Return a function from a step to its figures on this machine, None if unknown."""
        if self.hardware.name != HERE:
            return lambda _: None
        from bench.estimation.boards import known_figures, measured_once
        from bench.estimation.layer_timing import StepFigures, step_figures

        kind = next(model.network.parameters()).dtype

        def figures(step: RepeatedStep) -> StepFigures | None:
            facts = f"step {kind} {step.key}"
            if not self._measures:
                return known_figures(facts, StepFigures)
            timer = functools.partial(step_figures, step, model.device, kind)
            return measured_once(facts, timer, StepFigures)

        return figures

    def _timed(self, phase: Phase, untimed: Phase, dtype: str) -> PhaseEstimate:
        def timed(work: Work, plain: Work) -> Time:
            found, bound = (time_of(each, self.hardware, dtype) for each in (work, plain))
            return found._replace(bound_by=bound.bound_by)

        least, most = timed(phase.least, untimed.least), timed(phase.most, untimed.most)
        parts = {
            name: timed(work, untimed.parts[name])
            for name, work in phase.parts.items()
            if work != Work()
        }
        demand = phase.demand
        bound_by, high = most.bound_by, most.high
        if phase.limited != Work():
            limited = timed(phase.limited, untimed.limited)
            bound_by, high = limited.bound_by, high + min(limited.high, phase.limit)
        return PhaseEstimate(
            phase.name, phase.kind, least.low, high, bound_by, phase.memory, parts,
            demand.given if demand else 0.0, demand.shared if demand else 0.0,
            bool(demand and demand.sampled),
        )  # fmt: skip

    def _recorded(self, results_dir: Path) -> AnswerRecords:
        from bench.estimation.tasks import AnswerRecords
        from bench.records import Store

        return self._answers.setdefault(results_dir, AnswerRecords(Store(results_dir)))

    def _describe(self, config: RunConfig, source: ModelSource, dtype: str) -> Described:
        # The device map does not affect shapes.
        model = source.config.model_copy(update={"device_map": None})
        key = (source.folder, model.model_dump_json(), dtype, config.costs.words)
        if key not in self._described:
            self._described[key] = _described(config, source, dtype, self.hardware, self._measures)
        return self._described[key]

    def _tasks(
        self, benchmark: PlannedBenchmark, described: Described, source: ModelSource
    ) -> tuple[tuple[TaskDemand, ...], list[str]]:
        from bench.estimation.tasks import task_demands

        if described.model.tokenizer is None and source.config.kind != "image_classifier":
            return (), []  # Reported elsewhere: without a tokenizer there are no tokens.
        # The cache contains the plan, so that its id is not used by another object.
        key = (id(benchmark), id(described))
        if key not in self._demands:
            free = self.hardware.memory - described.work.stored
            try:
                self._demands[key] = tuple(task_demands(benchmark.harness, described.model, free))
            except UserError as error:
                return (), [f"tokens of {benchmark.benchmark.name}: {error_sentence(error)}"]
        return self._demands[key], []


def _described(
    config: RunConfig, source: ModelSource, dtype: str, hardware: HardwareConfig, measures: bool
) -> Described:
    """Build the network on the meta device and count it; `measures` times it on this machine."""
    import torch

    from bench.estimation import network as networks
    from bench.models import loading
    from bench.models.classifiers.classifier import Classifier
    from bench.models.model import Model
    from bench.models.structure.model_structure import inspect_model

    kind: torch.dtype = getattr(torch, dtype)
    skeleton = loading.skeleton(source)
    structure = inspect_model(skeleton)
    missing: list[str] = []
    tokenizer = processor = None
    try:
        tokenizer, processor = loading.load_tokenizer_and_processor(source)
    except UserError as error:
        missing.append(f"tokens: {error_sentence(error)}")
    model = Model(
        config=source.config,
        network=skeleton.to(kind),
        tokenizer=tokenizer,
        processor=processor,
        fingerprint=source.fingerprint,
        revision=source.revision,
        device=torch.device(hardware.device),
    )
    began = time.perf_counter()
    if isinstance(skeleton, Classifier):
        work = networks.classifier_work(skeleton, kind.itemsize)
    else:
        work = networks.decoder_work(skeleton, structure, kind.itemsize)
    # A run counts all layers instead of one per form.
    forms = len({networks.layer_form(layer) for layer in structure.layers})
    seconds = (time.perf_counter() - began) * max(1.0, len(structure.layers) / max(1, forms))
    if work.missing:
        missing.append(work.missing)
    if hardware.name == HERE:
        work = networks.with_times(work, skeleton, structure, model.device, measure=measures)
    prompt = _prompt(model, config.costs.words, work, missing, measures)
    return Described(model, structure, work, prompt, seconds, tuple(missing))


def _prompt(
    model: Model, words: int, work: NetworkWork, missing: list[str], measures: bool
) -> Prompt | None:
    """Return a prompt with an image as the processor builds it, None for other models."""
    import torch

    from bench.estimation.network import encoding_seconds, vision_work
    from bench.measurement import image_prompt

    if model.config.kind != "image_text" or model.processor is None:
        return None
    on_host = replace(model, device=torch.device("cpu"))
    try:
        inputs = image_prompt.build_image_prompt(on_host, words)
        tokens = image_prompt.prompt_tokens(on_host, inputs)
        encoding = vision_work(model.network, inputs, tokens.visual, work.itemsize)
        seconds = encoding_seconds(work, model.network, inputs, model.device, measure=measures)
    except (UserError, RuntimeError) as error:
        missing.append(f"images: {error_sentence(error)}")
        return None
    return Prompt(tokens.visual, tokens.text, encoding, seconds)


def _subject(
    config: RunConfig,
    source: ModelSource,
    described: Described,
    tasks: tuple[TaskDemand, ...],
    hardware: HardwareConfig,
    benchmark: PlannedBenchmark | None,
) -> Subject:
    from bench.estimation.boards import collecting_seconds
    from bench.models.network import text_config

    network, work = described.model.network, described.work
    hidden = vocabulary = each = 0
    if config.model.kind != "image_classifier":
        from bench.evaluation.batching import bytes_per_token

        language = text_config(network)
        hidden, vocabulary = int(language.hidden_size), int(language.vocab_size)
        each = bytes_per_token(language, next(network.parameters()).dtype)
    reads_memory = "memory" in config.costs.measure
    splits = getattr(benchmark.harness, "splits", None) if benchmark is not None else None
    here = hardware.name == HERE
    if not here:
        # Seconds of Python are valid only on this machine; other hardware states them per request.
        tasks = tuple(replace(task, seconds=0.0) for task in tasks)
    return Subject(
        config=config,
        network=work,
        structure=described.structure,
        tasks=tasks,
        device=hardware.device,
        memory=hardware.memory,
        size_on_disk=_size_on_disk(source) or work.stored,
        prompt=described.prompt,
        hidden=hidden,
        bytes_per_token=each,
        vocabulary=vocabulary,
        training_images=len(splits.train) if splits is not None else 0,
        tensors=len(list(network.parameters())),
        counting_seconds=described.counting_seconds if here else None,
        collecting_seconds=collecting_seconds() if here and reads_memory else 0.0,
    )


def _dtype_of(config: RunConfig, hardware: HardwareConfig) -> str:
    """Return the dtype of a run on hardware: the requested one, or the hardware's default."""
    dtype: str = config.model.dtype
    return dtype if dtype != "auto" else "bfloat16" if hardware.device == "cuda" else "float32"


def _size_on_disk(source: ModelSource) -> float:
    return float(sum(file.stat().st_size for file in source.folder.glob("*.safetensors")))


def _name_of(config: RunConfig) -> str:
    methods = ",".join(config.method) or "dense"
    return f"{config.model.name} {methods} {config.benchmark.name}"


def _cures(subject: Subject, run: RunEstimate) -> Iterator[str]:
    """Yield changes with which a run might fit: streaming, smaller batches, another board."""
    room = _USABLE * run.hardware.memory
    if subject.map is None and subject.device == "cuda":
        given = subject.config.model.model_copy(update={"device_map": "offload_cpu"})
        streamed = replace(subject, config=subject.config.model_copy(update={"model": given}))
        need = max(phase.memory for phase in phases_of(streamed))
        if need <= room:
            yield (
                f"model.device_map=offload_cpu streams one layer at a time and needs "
                f"{need / 1e9:.1f} GB; offload_disk, if the host has no "
                f"{subject.network.stored / 1e9:.0f} GB either"
            )
    over = [phase for phase in run.phases if phase.memory > room]
    names = [phase.name.removeprefix("applying ") for phase in over if phase.kind == "apply"]
    batched = [n for n in names if getattr(subject.config.method.get(n), "batch", 1) > 1]
    if batched and subject.weights * subject.copies < room:
        yield f"method.{batched[0]}.batch=1 takes fewer rows at a time"
    if subject.weights * subject.copies < room and any(p.kind == "evaluate" for p in over):
        yield "benchmark.batch_size=1, or a smaller model.max_length"
