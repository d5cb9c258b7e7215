"""Phases of a run as work: loading, methods, tasks and measurements, each with its memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import TYPE_CHECKING, Any

from bench.estimation.subject import Subject
from bench.estimation.work import Work
from bench.measurement.interleaving import SETTLING_WINDOW
from bench.method import InputSize

if TYPE_CHECKING:
    from bench.estimation.layer_timing import StepFigures
    from bench.estimation.tasks import TaskDemand
    from bench.method import Method

_OPTIMIZER_OPERATORS = 12
"""Operators of an optimizer and a proximal step per tensor of weights."""
SCORED_AT_ONCE = 256
"""Images per forward when a classifier is scored during training."""
_LOADED = (0.4, 6.5)
"""Time to load a network, without its bytes, over the time to build it without weights."""
_FAULTS = 4
"""Passes over new memory that cost as much as the first, in which its pages are mapped."""
SETTLED_AFTER = 2 * SETTLING_WINDOW
"""Minimum number of rounds for times to settle, because the medians of two windows are compared."""


@dataclass(frozen=True)
class Phase:
    """One phase of a run: lower and upper bound of its work, and peak bytes on the device.

    `name` is the name under which a run records its time. `parts` are parts of the work to report
    separately. `demand` is that of a task. `limited` is additional work in the upper bound, which
    ends after `limit` seconds even if it is not done. `dtype` is that of its products if it is not
    the model's.
    """

    name: str
    kind: str
    least: Work
    most: Work
    memory: float
    parts: dict[str, Work] = field(default_factory=dict)
    demand: TaskDemand | None = None
    limited: Work = field(default_factory=Work)
    limit: float = 0.0
    dtype: str | None = None


def phases_of(subject: Subject) -> Iterator[Phase]:
    """Yield the phases of a run in order."""
    yield _loading(subject)
    for name, method in subject.config.method.items():
        yield _method(subject, name, method)
    for demand in subject.tasks:
        yield _task(subject, demand)
    yield _counting(subject)
    if subject.config.costs.measure:
        yield _measuring(subject)


def _loading(subject: Subject) -> Phase:
    built = subject.building_seconds
    least = most = Work(starts=1)
    if built is not None:
        collected = Work(timed=subject.collecting_seconds)
        least, most = (collected + Work(seconds=times * built) for times in _LOADED)
    read = Work(disk=subject.size_on_disk)
    if subject.device == "cuda" and subject.map is None:
        read += Work(link=subject.network.stored)
    copy = Work(moved=2 * subject.network.stored)
    held = subject.weights * (2 if subject.memory > 2.5 * subject.network.stored else 1)
    # The files may be in the page cache.
    least += Work(link=read.link) + copy * (built is not None)
    return Phase("loading the model", "load", least, most + read + copy * _FAULTS, held)


def _method(subject: Subject, name: str, method: Method) -> Phase:
    if hasattr(method, "recipe") and subject.training_images:
        return _training(subject, name, method)
    network, inputs = subject.network, subject.input_size(method)
    tokens = inputs.tokens
    cost, batch = subject.declared[name], inputs.batch
    one, seen = (_pass(subject, inputs, inputs.rows, batch, observed=o) for o in (False, True))
    images = _encoding(subject, inputs.rows if method.uses_prompts else 0)
    given = one + images
    calibrate = given * (cost.forwards - cost.observed) + (seen + images) * cost.observed
    calibrate += network.head_only(tokens) * cost.logits
    graph = _pass(subject, inputs, inputs.rows, cost.together) + network.head_only(tokens)
    calibrate += graph * (2 * cost.backwards)
    calibrate += Work(precise=cost.flops, moved=cost.elements * 4)
    train = _pass(subject, inputs, cost.trained, cost.together)
    train += network.head_only(cost.trained * inputs.length)
    train = train * (2 + cost.updated) + _encoding(subject, cost.trained if inputs.visual else 0)
    apply = Work(operators=cost.operators, moved=cost.readings * network.stored)
    for step in cost.steps:
        apply += subject.step_work(step) * step.times
    if subject.map is not None:
        passes = max(1.0, cost.forwards + cost.backwards)
        moved = network.streamed(1)
        # Each layer is loaded once per walk and written back changed.
        apply += Work(link=2 * moved, disk=2 * moved * (subject.map == "offload_disk"))
        calibrate += Work(link=2 * passes * tokens * subject.hidden * network.itemsize)
    work = calibrate + train + apply
    waiting = tokens * subject.hidden * network.itemsize * (subject.map is None)
    live = min(batch, inputs.rows or batch) * inputs.length * _live_bytes(subject)
    if cost.backwards or cost.trained:
        # All activations are kept for the backward pass, and also logits and their gradient.
        kept = network.elements * network.itemsize / 2 + 12 * subject.vocabulary
        live = max(live, min(cost.together, inputs.rows or cost.together) * inputs.length * kept)
    memory = subject.weights * subject.copies + waiting + live + cost.memory
    parts = {"calibrate": calibrate, "train": train, "apply": apply}
    most = work + given * cost.possible
    return Phase(f"applying {name}", "apply", work, most, memory, parts)


def _added_per_call(subject: Subject, tokens: float) -> Work:
    """Return the additional work of a forward of that many tokens in the changed network."""
    added = Work()
    for step, work in subject.steps_per_call:
        share = subject.network.met_share(tokens) if step.routed else 1.0
        added += work * (step.times * share)
    return added


def _pass(
    subject: Subject, inputs: InputSize, rows: float, batch: int, *, observed: bool = False
) -> Work:
    """Return one forward of `rows` rows through the decoder's layers, in batches of `batch`."""
    length = inputs.length
    return subject.network.forward(
        rows * length,
        ceil(rows / batch),
        rows * length**2,
        looped=subject.device == "cpu",
        observed=observed,
    )


def _encoding(subject: Subject, images: float) -> Work:
    return subject.prompt.encoding * images if subject.prompt else Work()


def _training(subject: Subject, name: str, method: Method) -> Phase:
    recipe: Any = getattr(method, "recipe")  # noqa: B009  # only some methods have one
    steps = subject.training_images // recipe.batch * recipe.epochs
    scored = sum(demand.documents for demand in subject.tasks)
    memory = _training_memory(subject, method, scored)
    timed = _timed_training(subject, name, recipe.batch)
    if timed is not None:
        figures, per_batch = timed
        step = Work(timed=per_batch * figures.seconds)
        if per_batch == 1:
            memory = subject.copies * subject.weights + figures.peak_bytes
    else:
        # A network is timed in the dtype of its weights.
        times = subject.network.times if recipe.dtype == "float32" else None
        step = replace(subject.network, times=times).training(recipe.batch, 1)
        step += Work(
            operators=float(_OPTIMIZER_OPERATORS * subject.tensors),
            moved=8 * subject.network.stored,
        )
    # After each epoch, held-out images are scored and the state is saved.
    epoch = subject.network.forward(scored, ceil(scored / SCORED_AT_ONCE))
    epoch += Work(moved=4 * subject.network.stored)
    work = step * steps + epoch * recipe.epochs
    return Phase(
        f"applying {name}", "apply", work, work, memory, {"train": work}, dtype=recipe.dtype
    )


def _timed_training(subject: Subject, name: str, batch: int) -> tuple[StepFigures, float] | None:
    """Return a step's figures and how often it fills a batch, None if none can be measured."""
    for step in subject.declared[name].steps:
        # FLOPs of the network are known here, and determine whether the step is too large.
        flops = 3 * batch / step.times * subject.network.matrix
        figures = subject.figures(replace(step, flops=flops))
        if figures is not None:
            return figures, step.times
    return None


def _training_memory(subject: Subject, method: Method, scored: int) -> float:
    """Return the bytes of networks, gradients, moments, and activations of the widest call."""
    recipe: Any = getattr(method, "recipe")  # noqa: B009  # only some methods have one
    moments = 2 if recipe.optimizer == "adam" else 1 if recipe.momentum else 0
    # New weights are in memory together with the loaded ones; each weight has a gradient.
    networks = subject.copies + method.restarts + 1 + moments
    work = subject.network
    # The loss follows the last operator of the forward, when all kept activations are in memory.
    trained = recipe.batch * (work.kept + work.widest)
    numbers = max(trained, min(scored, SCORED_AT_ONCE) * work.widest)
    return float(networks * subject.weights + numbers * work.itemsize)


def _task(subject: Subject, demand: TaskDemand) -> Phase:
    network, looped = subject.network, subject.device == "cpu"
    tokens, pairs, computed = demand.computed, demand.pairs, demand.computed
    prompt = subject.prompt
    encoding = Work()
    if demand.images and prompt:
        tokens = float(demand.documents * prompt.tokens)
        pairs = float(demand.documents * prompt.tokens**2)
        computed, encoding = tokens, prompt.encoding * demand.images
    base = network.forward(tokens, demand.calls, pairs, demand.rows, looped=looped) + encoding
    base += _added_per_call(subject, tokens / max(1, demand.calls)) * demand.calls
    if subject.map is not None:
        base += Work(
            link=network.streamed(demand.calls),
            disk=network.streamed(demand.calls) * (subject.map == "offload_disk"),
        )
    least, most = (
        base + _written(subject, demand, end, computed / max(1, demand.requests), looped)
        for end in (0, 1)
    )
    if demand.seconds:
        # Measured while building the requests; scoring and metrics take at most as long.
        least, most = least + Work(seconds=demand.seconds), most + Work(seconds=2 * demand.seconds)
    else:
        least, most = least + Work(requests=demand.requests), most + Work(requests=demand.requests)
    widest = demand.widest or (tokens / max(1.0, demand.calls))
    logits = min(widest, demand.rows / max(1.0, demand.calls)) * subject.vocabulary * 8
    memory = subject.weights * subject.copies + widest * _live_bytes(subject) + logits
    model = subject.config.model.name
    return Phase(f"{model} on {demand.name}", "evaluate", least, most, memory, demand=demand)


def _written(subject: Subject, demand: TaskDemand, end: int, length: float, looped: bool) -> Work:
    """Return the decoding of answers: `end` 0 at minimum length, 1 at maximum length."""
    written, steps = demand.written[end], demand.steps[end]
    if not written:
        return Work()
    # Each token attends to the prompt and, on average, half of the answer.
    answer = written / max(1, demand.requests)
    decoding = subject.network.forward(
        written, steps, written * (length + answer / 2), written, looped=looped
    )
    return decoding + _added_per_call(subject, written / max(1, steps)) * steps


def _counting(subject: Subject) -> Phase:
    counts = 1 + len(subject.config.method)
    memory = subject.weights * subject.copies
    if subject.counting_seconds is not None:
        # Such a count was just made on this machine.
        count = Work(timed=subject.counting_seconds)
        return Phase("counting costs", "measure", count * 0.6, count * counts, memory)
    return Phase("counting costs", "measure", Work(), Work(starts=1), memory)


def _measuring(subject: Subject) -> Phase:
    """Return the calls for every shape, depending on the requested measurements."""
    config, timing = subject.config, subject.config.costs.timing
    memory = subject.weights * subject.copies
    least, timed, added, seconds, collected = Work(), Work(), Work(), 0.0, 0
    shapes = list(_shapes(subject))
    for batch, tokens in shapes:
        call, written = _call_at(subject, batch, tokens)
        more = _added_per_call(subject, batch * tokens)
        if written != Work():
            more += _added_per_call(subject, batch) * (timing.new_tokens - 1)
        if "memory" in config.costs.measure:
            # The peak of a prefill is measured separately from that of generation.
            least += call + (call + written if written != Work() else Work()) + more
            # Two peaks, a restart and the end of the shape, or one peak and the end.
            collected += 4 if written != Work() else 2
        if "latency" in config.costs.measure:
            timed += call + written
            added += more
        if "energy" in config.costs.measure:
            stages = 2 if written != Work() else 1
            seconds += stages * timing.energy_seconds * _compared(subject)
    least += Work(seconds=seconds, timed=collected * subject.collecting_seconds)
    if not shapes or timed == Work():
        return Phase("measuring costs", "measure", least, least, memory + _widest(subject, shapes))
    # FLOPs are counted in a separate call, and times settle in warm-up rounds.
    once, compared = timed * _compared(subject) + added, bool(config.method)
    settled = min(SETTLED_AFTER, timing.max_warmup_rounds)
    fewest = once * (1 + settled + timing.rounds)
    sure = once * (1 + timing.max_warmup_rounds + timing.rounds * timing.attempts)
    # Further rounds follow only while a ratio is not precise, and only up to a time limit.
    further = once * (compared * (timing.max_rounds - timing.rounds) * timing.attempts)
    return Phase(
        "measuring costs",
        "measure",
        least + fewest,
        least + sure,
        memory + _widest(subject, shapes),
        limited=further,
        limit=len(shapes) * timing.max_seconds * timing.attempts,
    )


def _compared(subject: Subject) -> int:
    """Return the number of interleaved networks: a changed one is timed beside the dense one."""
    return 2 if subject.config.method else 1


def _shapes(subject: Subject) -> Iterator[tuple[int, float]]:
    """Yield batch and tokens per row for each measured shape; a classifier's image is a token."""
    timing, prompt = subject.config.costs.timing, subject.prompt
    kind = subject.config.model.kind
    for batch in timing.batches:
        if kind == "image_classifier":
            yield batch, 1.0
        elif kind == "causal_lm":
            yield from ((batch, float(length)) for length in timing.lengths)
        elif prompt is not None:
            # The prompt was built with the number of words for which FLOPs are counted.
            each = prompt.text / subject.config.costs.words
            yield from ((batch, prompt.visual + each * words) for words in timing.words)


def _call_at(subject: Subject, batch: int, length: float) -> tuple[Work, Work]:
    """Return one forward at a shape, and the decoding of an answer after it."""
    network, looped = subject.network, subject.device == "cpu"
    tokens = batch * length
    if subject.config.model.kind == "image_classifier":
        return network.forward(tokens, 1), Work()
    call = network.forward(tokens, 1, tokens * length, batch, looped=looped)
    call += _encoding(subject, batch)
    # The first new token belongs to the prefill.
    steps = subject.config.costs.timing.new_tokens - 1
    written = float(batch * steps)
    pairs = written * (length + steps / 2)
    return call, network.forward(written, steps, pairs, written, looped=looped)


def _widest(subject: Subject, shapes: Sequence[tuple[int, float]]) -> float:
    tokens = max((batch * length for batch, length in shapes), default=0.0)
    return tokens * subject.bytes_per_token


def _live_bytes(subject: Subject) -> int:
    """Return the bytes of one token's activations in the widest layer, without logits."""
    return max(0, subject.bytes_per_token - 12 * subject.vocabulary)
