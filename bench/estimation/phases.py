"""Phases of a run as work: loading, methods, tasks, measurements, and the memory of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.estimation.work import Work

if TYPE_CHECKING:
    from bench.config.run_config import RunConfig
    from bench.estimation.network import NetworkWork
    from bench.estimation.tasks import TaskDemand
    from bench.method import Method
    from bench.models.structure.model_structure import ModelStructure

OFFLOADED = ("offload_cpu", "offload_disk")
_OPTIMIZER_OPERATORS = 12
"""Operators of an optimizer and a proximal step per tensor of weights."""


@dataclass(frozen=True)
class Prompt:
    """One prompt with an image: its tokens, and the work of encoding its image."""

    visual: int
    text: int
    encoding: Work

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return self.visual + self.text


@dataclass(frozen=True)
class Subject:
    """Everything that a run's estimate is made of, found without a weight.

    `training_images` is the size of the data set that methods train on, `size_on_disk` bytes of
    weight files, `offloaded` whether layers wait outside the device.
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
    counting_seconds: float | None = None

    @property
    def map(self) -> str | None:
        """The device map, if it keeps layers off the device."""
        asked = self.config.model.device_map
        return asked if asked in OFFLOADED else None

    @property
    def weights(self) -> float:
        """Bytes of weights on the device: one layer of them when they are offloaded."""
        stored = self.network.stored
        if self.map is None:
            return stored
        layers = self.network.weights + self.network.routed
        # A layer that is narrowed is held twice for a moment.
        return stored - layers + 2 * layers / max(1, self.network.depth)

    @property
    def copies(self) -> int:
        """Networks on the device while methods work: the dense one is kept where there is room."""
        whole = bool(self.config.method) and self.config.model.device_map is None
        return 2 if whole and self.memory > 2.5 * self.network.stored else 1


@dataclass(frozen=True)
class Phase:
    """One phase of a run: its work at least and at most, and bytes on the device at its peak.

    `name` is that under which a run times it. `parts` are shares of the work that are worth telling
    apart. `asked` is what a task asks.
    """

    name: str
    kind: str
    least: Work
    most: Work
    memory: float
    parts: dict[str, Work] = field(default_factory=dict)
    asked: TaskDemand | None = None


def phases_of(subject: Subject) -> Iterator[Phase]:
    """Yield the phases of a run in order."""
    yield _loading(subject)
    for name, method in subject.config.method.items():
        yield _method(subject, name, method)
    for asked in subject.tasks:
        yield _task(subject, asked)
    yield _counting(subject)
    if subject.config.costs.measure:
        yield _measuring(subject)


def _loading(subject: Subject) -> Phase:
    read = Work(starts=1, disk=subject.size_on_disk)
    if subject.device == "cuda" and subject.map is None:
        read += Work(link=subject.network.stored)
    copy = Work(moved=2 * subject.network.stored)
    held = subject.weights * (2 if subject.memory > 2.5 * subject.network.stored else 1)
    # The page cache may hold the files.
    least = Work(starts=1) + Work(link=read.link)
    return Phase("loading the model", "load", least, read + copy, held)


def _method(subject: Subject, name: str, method: Method) -> Phase:
    if hasattr(method, "recipe") and subject.training_images:
        return _training(subject, name, method)
    config, network = subject.config, subject.network
    if method.uses_calibration:
        rows, length = config.calibration.rows, float(config.calibration.length)
    elif method.uses_prompts and subject.prompt:
        rows, length = config.prompts.count, float(subject.prompt.tokens)
    else:
        rows, length = 0, 0.0
    tokens = rows * length
    batch = int(getattr(method, "batch", 0) or config.prompts.batch)
    cost = method.work(subject.structure, int(tokens))
    calls = -(-rows // batch)
    looped = subject.device == "cpu"
    one = network.forward(tokens, calls, rows * length**2, looped=looped, observed=cost.observed)
    calibrate = one * cost.forwards + one * (2 * cost.backwards)
    if method.uses_prompts and subject.prompt:
        calibrate += subject.prompt.encoding * rows
    calibrate += Work(precise=cost.flops, moved=cost.elements * 4)
    apply = Work(operators=cost.operators, moved=cost.readings * network.stored)
    if subject.map is not None:
        passes = max(1.0, cost.forwards + cost.backwards)
        moved = network.streamed(1)
        # Each layer comes once per walk and goes back changed.
        apply += Work(link=2 * moved, disk=2 * moved * (subject.map == "offload_disk"))
        calibrate += Work(link=2 * passes * tokens * subject.hidden * network.itemsize)
    whole = calibrate + apply
    waiting = tokens * subject.hidden * network.itemsize * (subject.map is None)
    live = min(batch, rows or batch) * length * _live_bytes(subject)
    memory = subject.weights * subject.copies + waiting + live + cost.memory
    return Phase(
        f"applying {name}", "apply", whole, whole, memory,
        {"calibrate": calibrate, "apply": apply},
    )  # fmt: skip


def _training(subject: Subject, name: str, method: Method) -> Phase:
    recipe: Any = getattr(method, "recipe")  # noqa: B009  # only some methods have one
    steps = subject.training_images // recipe.batch * recipe.epochs
    step = subject.network.training(recipe.batch, 1)
    step += Work(
        operators=float(_OPTIMIZER_OPERATORS * subject.tensors),
        moved=8 * subject.network.stored,
    )
    whole = step * steps
    elements = subject.network.elements * recipe.batch * subject.network.itemsize
    return Phase(
        f"applying {name}", "apply", whole, whole, 4 * subject.weights + elements,
        {"train": whole},
    )  # fmt: skip


def _task(subject: Subject, asked: TaskDemand) -> Phase:
    network, looped = subject.network, subject.device == "cpu"
    tokens, pairs, computed = asked.computed, asked.pairs, asked.computed
    prompt = subject.prompt
    encoding = Work()
    if asked.images and prompt:
        tokens = float(asked.documents * prompt.tokens)
        pairs = float(asked.documents * prompt.tokens**2)
        computed, encoding = tokens, prompt.encoding * asked.images
    base = network.forward(tokens, asked.calls, pairs, asked.rows, looped=looped) + encoding
    if subject.map is not None:
        base += Work(
            link=network.streamed(asked.calls),
            disk=network.streamed(asked.calls) * (subject.map == "offload_disk"),
        )
    least, most = (
        base + _written(subject, asked, end, computed / max(1, asked.requests), looped)
        for end in (0, 1)
    )
    if asked.seconds:
        # Measured while the requests were built; scoring and metrics take as long at the most.
        least, most = least + Work(seconds=asked.seconds), most + Work(seconds=2 * asked.seconds)
    else:
        least, most = least + Work(requests=asked.requests), most + Work(requests=asked.requests)
    widest = asked.widest or (tokens / max(1.0, asked.calls))
    logits = min(widest, asked.rows / max(1.0, asked.calls)) * subject.vocabulary * 8
    memory = subject.weights * subject.copies + widest * _live_bytes(subject) + logits
    model = subject.config.model.name
    return Phase(f"{model} on {asked.name}", "evaluate", least, most, memory, asked=asked)


def _written(subject: Subject, asked: TaskDemand, end: int, length: float, looped: bool) -> Work:
    """Return the decoding of answers: `end` 0 at their shortest, 1 at their longest."""
    written, steps = asked.written[end], asked.steps[end]
    if not written:
        return Work()
    # Each token meets the prompt and, on the mean, half of the answer.
    answer = written / max(1, asked.requests)
    return subject.network.forward(
        written, steps, written * (length + answer / 2), written, looped=looped
    )


def _counting(subject: Subject) -> Phase:
    counts = 1 + len(subject.config.method)
    memory = subject.weights * subject.copies
    if subject.counting_seconds is not None:
        # A count like this one was just made on this machine.
        least = Work(seconds=subject.counting_seconds)
        return Phase("counting costs", "measure", least, least * (3 + counts), memory)
    return Phase("counting costs", "measure", Work(), Work(starts=1), memory)


def _measuring(subject: Subject) -> Phase:
    config, network = subject.config, subject.network
    timing, pair = config.costs.timing, 2 if config.method else 1
    shapes = [(b, n) for b in timing.batches for n in timing.lengths]
    once = Work()
    for batch, length in shapes:
        tokens = float(batch * length)
        once += network.forward(tokens, 1, tokens * length, tokens)
        steps = float(timing.new_tokens)
        once += network.forward(batch * steps, steps, batch * steps * length, batch * steps)
    least = once * (timing.rounds * pair)
    most = once * (timing.max_rounds * pair * timing.attempts)
    widest = max((b * n for b, n in shapes), default=1)
    memory = subject.weights * subject.copies + widest * subject.bytes_per_token
    return Phase("measuring costs", "measure", least, most, memory)


def _live_bytes(subject: Subject) -> int:
    """Return the bytes of one token's activations in the widest layer, logits apart."""
    return max(0, subject.bytes_per_token - 12 * subject.vocabulary)
