"""Inputs of an estimate: the run's config, its network and tasks, and times of this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from bench.estimation.work import Work
from bench.method import InputSize

if TYPE_CHECKING:
    from bench.config.run_config import RunConfig
    from bench.estimation.layer_timing import StepFigures
    from bench.estimation.network import NetworkWork
    from bench.estimation.tasks import TaskDemand
    from bench.method import Method, MethodWork, RepeatedStep
    from bench.models.structure.model_structure import ModelStructure

OFFLOADED = ("offload_cpu", "offload_disk")


@dataclass(frozen=True)
class Prompt:
    """One prompt with an image: its tokens, and the work to encode its image.

    `seconds` is the time to encode it on this machine, if known.
    """

    visual: int
    text: int
    work: Work
    seconds: float | None = None

    @property
    def encoding(self) -> Work:
        """Work to encode the image, as a time if that is known."""
        return self.work if self.seconds is None else Work(timed=self.seconds)

    @property
    def tokens(self) -> int:
        """Number of tokens of the prompt."""
        return self.visual + self.text


@dataclass(frozen=True)
class Subject:
    """Everything from which a run is estimated, without weights.

    `training_images` is the size of the data set on which methods train, and `size_on_disk` the
    bytes of weight files. `building_seconds`, `counting_seconds` and `collecting_seconds` are the
    times of building the network without weights, of counting it and of a garbage collection on
    this machine, if it is the hardware. `figures` returns the measured figures of a method's step,
    or None if unknown.
    """

    config: RunConfig
    network: NetworkWork
    structure: ModelStructure
    tasks: Sequence[TaskDemand]
    device: str
    memory: float
    size_on_disk: float
    prompt: Prompt | None = None
    hidden: int = 0
    bytes_per_token: int = 0
    vocabulary: int = 0
    training_images: int = 0
    tensors: int = 0
    building_seconds: float | None = None
    counting_seconds: float | None = None
    collecting_seconds: float = 0.0
    figures: Callable[[RepeatedStep], StepFigures | None] = lambda _: None

    @cached_property
    def declared(self) -> dict[str, MethodWork]:
        """Work that each method declares; cached, because some methods inspect the network."""
        return {
            name: method.work(self.structure, self.input_size(method))
            for name, method in self.config.method.items()
        }

    @cached_property
    def steps_per_call(self) -> list[tuple[RepeatedStep, Work]]:
        """Steps that forwards of the changed network repeat in addition, with the work of each."""
        steps = [step for work in self.declared.values() for step in work.per_call]
        return [(step, self.step_work(step)) for step in steps]

    @property
    def map(self) -> str | None:
        """The device map if it stores layers outside the device, else None."""
        device_map = self.config.model.device_map
        return device_map if device_map in OFFLOADED else None

    @property
    def weights(self) -> float:
        """Bytes of weights on the device: those of one layer if layers are offloaded."""
        stored = self.network.stored
        if self.map is None:
            return stored
        layers = self.network.weights + self.network.routed
        # While a layer is narrowed, both versions are in memory.
        return stored - layers + 2 * layers / max(1, self.network.depth)

    @property
    def copies(self) -> int:
        """Number of networks on the device while methods work: the dense one is kept if it fits."""
        whole = bool(self.config.method) and self.config.model.device_map is None
        return 2 if whole and self.memory > 2.5 * self.network.stored else 1

    def input_size(self, method: Method) -> InputSize:
        """Return the size of a method's calibration input: text, prompts, or nothing."""
        config, prompt = self.config, self.prompt
        if method.uses_calibration:
            rows, batch = config.calibration.rows, getattr(method, "batch", config.prompts.batch)
            return InputSize(rows, float(config.calibration.length), batch=batch)
        if prompt is None:
            return InputSize()
        rows = config.prompts.count if method.uses_prompts else 0
        return InputSize(rows, float(prompt.tokens), float(prompt.visual), config.prompts.batch)

    def step_work(self, step: RepeatedStep) -> Work:
        """Return the work of one step: its measured time, else its counts."""
        figures = self.figures(step)
        if figures is not None:
            return Work(timed=figures.seconds)
        return Work(precise=step.flops, moved=step.elements * 4, operators=step.operators)
