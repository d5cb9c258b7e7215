"""A text benchmark: resolve lm-eval's tasks and the texts for perplexity, with their data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bench.data import hub
from bench.errors import MissingData, unknown
from bench.evaluation.config import BenchmarkConfig
from bench.evaluation.memory import Memory
from bench.evaluation.scoring import Scores
from bench.evaluation.source import Source
from bench.evaluation.text import building, texts
from bench.evaluation.text.building import PlannedTask
from bench.evaluation.text.quiet import quiet
from bench.evaluation.text.texts import PlannedText
from bench.models.config import Kind
from bench.models.model import Model
from bench.progress import Progress


@dataclass(frozen=True)
class TextScoring:
    """The planned tasks and texts of one benchmark."""

    benchmark: BenchmarkConfig
    tasks: tuple[PlannedTask, ...]
    texts: tuple[PlannedText, ...]

    kinds: ClassVar[tuple[Kind, ...]] = ("causal_lm", "image_text")

    @property
    def sources(self) -> dict[str, Source]:
        """Where the documents of each task and each text came from."""
        found = {name: source for task in self.tasks for name, source in task.sources.items()}
        return found | {text.name: text.source for text in self.texts}

    def pictures(self, task: str, document: int) -> tuple[()]:
        """Return nothing: documents are texts."""
        return ()

    def score(self, model: Model, progress: Progress, memory: Memory) -> Scores:
        """Score the model on every task and text."""
        from bench.evaluation.text.running import score

        return score(model, self.benchmark, self.tasks, self.texts, progress, memory)


def plan_text(benchmark: BenchmarkConfig, *, offline: bool) -> TextScoring:
    """Find and load all tasks and texts of a benchmark.

    Raises:
        MissingData: data are neither cached nor reachable on the hub.
        UserError: the config names a task, a metric, a file or a text that does not exist or fit.
    """
    scored = building.names(benchmark)
    for name in benchmark.data:
        if name not in scored:
            raise unknown("task in benchmark.data", name, scored)
    # Decided once for the process: without this, every data set would wait for its own timeout.
    if offline or (_asks_hub(benchmark) and not hub.is_reachable()):
        hub.go_offline()
    tasks: list[PlannedTask] = []
    loaded: list[PlannedText] = []
    # All failures are collected before any is reported: a user should not have to fix them one run
    # at a time.
    missing: list[str] = []
    for name in scored:
        try:
            tasks.append(building.build(name, benchmark))
        except hub.Unreachable as error:
            missing.append(f"{error} ({name})")
    for name, config in benchmark.perplexity.items():
        try:
            with quiet():
                loaded.append(texts.load(name, config))
        except hub.Unreachable as error:
            missing.append(f"{error} ({name})")
    if missing:
        raise _missing(benchmark, missing)
    return TextScoring(benchmark, tuple(tasks), tuple(loaded))


def _asks_hub(benchmark: BenchmarkConfig) -> bool:
    real = benchmark.suite == "real" and set(benchmark.tasks) - set(benchmark.data)
    texts = benchmark.perplexity.values()
    return bool(real) or any(text.text != "english" and not text.path for text in texts)


def _missing(benchmark: BenchmarkConfig, missing: list[str]) -> MissingData:
    return MissingData(
        f"benchmark {benchmark.name} needs data that are neither cached nor reachable: "
        f"{'; '.join(missing)}. Run `bench prefetch benchmark={benchmark.name}` with a network, or "
        "give local files: benchmark.data.TASK=PATH, benchmark.perplexity.NAME.path=PATH",
        missing,
    )
