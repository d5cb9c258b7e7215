"""Everything a benchmark needs, found before a model is loaded: tasks, texts, fingerprints."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import MissingData, unknown
from bench.evaluation.config import BenchmarkConfig

if TYPE_CHECKING:
    from bench.evaluation.building import PlannedTask
    from bench.evaluation.source import Source
    from bench.evaluation.texts import PlannedText


@dataclass(frozen=True)
class Plan:
    """A benchmark whose data are all there; any number of models can be evaluated on it."""

    benchmark: BenchmarkConfig
    tasks: tuple[PlannedTask, ...]
    texts: tuple[PlannedText, ...]

    @property
    def sources(self) -> dict[str, Source]:
        """Where each task's and each text's documents came from."""
        found = {name: source for task in self.tasks for name, source in task.sources.items()}
        return found | {text.name: text.source for text in self.texts}

    @property
    def fingerprints(self) -> dict[str, str]:
        """A fingerprint of the documents per task and per text."""
        return {name: source.fingerprint for name, source in self.sources.items()}

    @property
    def provenance(self) -> dict[str, dict[str, Any]]:
        """What a record keeps of the sources: origin, location, revision and fingerprint."""
        return {name: asdict(source) for name, source in self.sources.items()}


def plan(benchmark: BenchmarkConfig, *, offline: bool) -> Plan:
    """Find and load all data of a benchmark; what is missing is named at once, all of it.

    With no network, or with `offline`, the process stays off the hub from then on.

    Raises:
        MissingData: data are neither cached nor to be had from the hub.
        UserError: a task, a metric, a file or a text is not what the config takes it for.
    """
    from bench.data import hub
    from bench.evaluation import building, texts
    from bench.evaluation.quiet import quiet

    scored = building.names(benchmark)
    for name in benchmark.data:
        if name not in scored:
            raise unknown("task in benchmark.data", name, scored)
    if offline or (_asks_hub(benchmark) and not hub.is_reachable()):
        hub.go_offline()
    tasks: list[PlannedTask] = []
    loaded: list[PlannedText] = []
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
    return Plan(benchmark, tuple(tasks), tuple(loaded))


def plan_once(benchmark: BenchmarkConfig, *, offline: bool) -> Plan:
    """Return `plan(...)`, kept from the last call as long as the local files are the same.

    The runs of a sweep share their benchmark, and building its tasks takes longer than many runs.
    """
    paths = [path for path in benchmark.data.values() if path]
    paths += [text.path for text in benchmark.perplexity.values() if text.path]
    files = [Path(path) for path in sorted(paths)]
    stamps = [(f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.is_file()]
    return _kept(benchmark.model_dump_json(), tuple(stamps), offline)


@functools.lru_cache(maxsize=4)
def _kept(benchmark: str, stamps: tuple[tuple[int, int], ...], offline: bool) -> Plan:
    """Build a plan; `stamps` only tells when a kept one is stale."""
    return plan(BenchmarkConfig.model_validate_json(benchmark), offline=offline)


def prefetch(benchmark: BenchmarkConfig) -> list[str]:
    """Download what a benchmark needs into the usual caches; return what is there afterwards.

    Each entry names a hub data set and the commit; data that need no network are not listed.
    """
    found = plan(benchmark, offline=False).sources.values()
    return sorted({f"{s.location}@{s.revision or 'main'}" for s in found if s.origin == "hub"})


def _asks_hub(benchmark: BenchmarkConfig) -> bool:
    real = benchmark.suite == "real" and set(benchmark.tasks) - set(benchmark.data)
    texts = benchmark.perplexity.values()
    return bool(real) or any(text.text != "english" and not text.path for text in texts)


def _missing(benchmark: BenchmarkConfig, missing: list[str]) -> MissingData:
    return MissingData(
        f"benchmark {benchmark.name} needs data that are neither cached nor reachable: "
        f"{'; '.join(missing)}. Run `bench prefetch benchmark={benchmark.name}` with a network, or "
        "give local files: benchmark.data.TASK=PATH, benchmark.perplexity.NAME.path=PATH"
    )
