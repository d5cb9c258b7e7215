"""Estimator of runs, from shapes and rates.

No weight is loaded: networks are on the meta device, and runs of a sweep share what was counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from bench.errors import UserError, error_sentence
from bench.estimation.hardware import HERE, HardwareConfig
from bench.estimation.phases import Phase, phases_of
from bench.estimation.run_estimate import USABLE, PhaseEstimate, RunEstimate
from bench.estimation.subject import Prompt, Subject
from bench.estimation.work import Time, Work, time_of
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

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Described:
    """A network without weights and its counts, shared by the runs of a sweep."""

    model: Model
    structure: ModelStructure
    work: NetworkWork
    prompt: Prompt | None
    building_seconds: float
    counting_seconds: float
    missing: tuple[str, ...] = ()


class Estimator:
    """Estimates runs; networks, tasks and prompts are reused for later runs.

    With `measures`, layers are timed on this machine, else only earlier measurements are used.
    `collects` is true if the runs' session does not exclude imports from garbage collection.
    """

    def __init__(
        self, hardware: HardwareConfig, *, measures: bool = False, collects: bool = True
    ) -> None:
        self.hardware = hardware
        self._measures = measures
        self._collects = collects
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
        from bench.estimation.boards import collecting_seconds

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
        if self._collects and hardware.name == HERE:
            untimed = replace(untimed, collecting_seconds=collecting_seconds())
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
            timer = partial(step_figures, step, model.device, kind)
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
    here = hardware.name == HERE
    skeleton, building = _timed(partial(loading.skeleton, source), warm=here)
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
    if isinstance(skeleton, Classifier):
        count = partial(networks.classifier_work, skeleton, kind.itemsize)
    else:
        count = partial(networks.decoder_work, skeleton, structure, kind.itemsize)
    work, counting = _timed(count, warm=here)
    # A run counts all layers instead of one per form.
    forms = len({networks.layer_form(layer) for layer in structure.layers})
    counting *= max(1.0, len(structure.layers) / max(1, forms))
    if work.missing:
        missing.append(work.missing)
    if here:
        work = networks.with_times(work, skeleton, structure, model.device, measure=measures)
    prompt = _prompt(model, config.costs.words, work, missing, measures)
    return Described(model, structure, work, prompt, building, counting, tuple(missing))


def _timed(call: Callable[[], _Result], *, warm: bool) -> tuple[_Result, float]:
    """Return a result and the seconds it took; with `warm`, those of a second call.

    The first one may include imports, which a run has done by the phase that is estimated.
    """
    if warm:
        call()
    began = time.perf_counter()
    result = call()
    return result, time.perf_counter() - began


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
    from bench.models.network import text_config

    network, work = described.model.network, described.work
    hidden = vocabulary = each = 0
    if config.model.kind != "image_classifier":
        from bench.evaluation.batching import bytes_per_token

        language = text_config(network)
        hidden, vocabulary = int(language.hidden_size), int(language.vocab_size)
        each = bytes_per_token(language, next(network.parameters()).dtype)
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
        building_seconds=described.building_seconds if here else None,
        counting_seconds=described.counting_seconds if here else None,
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
    room = USABLE * run.hardware.memory
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
