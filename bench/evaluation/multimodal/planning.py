"""A benchmark of questions about images: resolve lmms-eval's tasks, with their data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from bench.data import hub
from bench.errors import MissingData, UserError, unknown
from bench.evaluation.config import BenchmarkConfig
from bench.evaluation.memory import Memory
from bench.evaluation.scoring import Scores
from bench.evaluation.source import Source
from bench.models.config import Kind
from bench.models.model import Model
from bench.progress import Progress

if TYPE_CHECKING:
    from PIL.Image import Image

    from bench.evaluation.multimodal.building import PlannedTask


@dataclass(frozen=True)
class MultimodalScoring:
    """The planned tasks of one benchmark."""

    benchmark: BenchmarkConfig
    tasks: tuple[PlannedTask, ...]

    kinds: ClassVar[tuple[Kind, ...]] = ("image_text",)

    @property
    def sources(self) -> dict[str, Source]:
        """Where the documents of each task came from."""
        return {task.name: task.source for task in self.tasks}

    def pictures(self, task: str, document: int) -> list[Image]:
        """Return the images of a document, given its index in the whole data set."""
        (planned,) = (each for each in self.tasks if each.name == task)
        return planned.pictures(planned.places.index(document))

    def score(self, model: Model, progress: Progress, memory: Memory) -> Scores:
        """Score the model on every task."""
        from bench.evaluation.multimodal.running import score

        return score(model, self.benchmark, self.tasks, progress, memory)


def plan_multimodal(benchmark: BenchmarkConfig, *, offline: bool) -> MultimodalScoring:
    """Find and load all tasks of a benchmark.

    Raises:
        MissingData: data are neither cached nor reachable on the hub.
        UserError: the config names a task, a metric or a file that does not exist or fit.
    """
    for name in benchmark.data:
        if name not in benchmark.tasks:
            raise unknown("task in benchmark.data", name, benchmark.tasks)
    if benchmark.perplexity:
        raise UserError(
            "benchmark.perplexity needs benchmark.harness=lm_eval: it is measured on text"
        )
    if benchmark.num_fewshot:
        raise UserError(f"benchmark.num_fewshot={benchmark.num_fewshot}: lmms_eval supports 0 only")
    asks_hub = benchmark.suite == "real" and set(benchmark.tasks) - set(benchmark.data)
    if offline or (asks_hub and not hub.is_reachable()):
        hub.go_offline()
    # Imported here, since lmms-eval takes seconds to import and reads the hub's offline switches on
    # import, which `go_offline` must have set by then.
    from bench.evaluation.multimodal import building

    tasks: list[PlannedTask] = []
    missing: list[str] = []
    for name in dict.fromkeys(benchmark.tasks):
        try:
            tasks.append(building.build(name, benchmark))
        except hub.Unreachable as error:
            missing.append(f"{error} ({name})")
    if missing:
        raise _missing(benchmark, missing)
    return MultimodalScoring(benchmark, tuple(tasks))


def _missing(benchmark: BenchmarkConfig, missing: list[str]) -> MissingData:
    return MissingData(
        f"benchmark {benchmark.name} needs data that are neither cached nor reachable: "
        f"{'; '.join(missing)}. Run `bench prefetch benchmark={benchmark.name}` with a network, or "
        "give local files: benchmark.data.TASK=PATH",
        missing,
    )
