"""Plan a benchmark with its harness, and evaluate models on it."""

from __future__ import annotations

import pkgutil
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bench.data.digests import FileStamp, file_stamp
from bench.errors import UserError
from bench.evaluation.harness import SEED
from bench.evaluation.metrics import Evaluation, align_rows, headline_average, missing_average
from bench.schema import BenchmarkConfig
from bench.ui import SILENT, Progress

if TYPE_CHECKING:
    from bench.evaluation.harness import DocumentSource, Harness, ScoredBenchmark
    from bench.evaluation.metrics import SampleRow
    from bench.evaluation.response_cache import ResponseCache
    from bench.models.model import Model
    from bench.schema import ModelConfig

# Names instead of functions, because importing a harness takes seconds.
PLANNERS = {
    "lm_eval": "bench.evaluation.text.lm_eval:plan_text",
    "lmms_eval": "bench.evaluation.multimodal.lmms_eval:plan_multimodal",
    "images": "bench.evaluation.images:plan_images",
}


class Planner(Protocol):
    """Function that finds the data of a benchmark for one harness."""

    def __call__(self, benchmark: BenchmarkConfig, *, offline: bool) -> Harness:
        """Return the benchmark, ready to score any model."""


@dataclass(frozen=True)
class PlannedBenchmark:
    """A benchmark whose data are loaded; any number of models can be evaluated on it."""

    benchmark: BenchmarkConfig
    harness: Harness

    @property
    def sources(self) -> dict[str, DocumentSource]:
        """Where the documents of each task and each text came from."""
        return self.harness.sources

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of the documents per task and per text."""
        return {name: source.fingerprint for name, source in self.sources.items()}

    @property
    def definitions(self) -> dict[str, str]:
        """Hash of each task's definition, with the code that it names."""
        return self.harness.definitions

    @property
    def folders(self) -> frozenset[Path]:
        """Folders of the harness's task files and of their code."""
        return self.harness.folders

    @property
    def provenance(self) -> dict[str, dict[str, str | None]]:
        """Sources as stored in a record: origin, location, revision and fingerprint."""
        return {name: asdict(source) for name, source in self.sources.items()}

    def check_model(self, model: ModelConfig) -> None:
        """Raise UserError unless the benchmark's harness supports this kind of model."""
        if model.kind not in self.harness.kinds:
            raise UserError(
                f"benchmark={self.benchmark.name} needs a model of kind "
                f"{' or '.join(self.harness.kinds)}; model={model.name} is {model.kind}"
            )


def plan(benchmark: BenchmarkConfig, *, offline: bool) -> PlannedBenchmark:
    """Find and load all data of a benchmark, and report everything that is missing at once.

    Without a network, or with `offline`, the process does not use the hub from then on.

    Raises:
        MissingData: data are neither cached nor reachable on the hub.
        UserError: the config names a task, metric, file or text that does not exist or does not
            fit.
    """
    return PlannedBenchmark(benchmark, _planned_harness(benchmark, offline=offline))


def _planned_harness(benchmark: BenchmarkConfig, *, offline: bool) -> Harness:
    planner: Planner = pkgutil.resolve_name(PLANNERS[benchmark.harness])
    return planner(benchmark, offline=offline)


class PlanCache:
    """Recent plans, which are reused as long as their local files are unchanged.

    The runs of a sweep share their benchmark, and building its tasks can take longer than a run.
    """

    def __init__(self) -> None:
        self._plans: OrderedDict[tuple[object, ...], PlannedBenchmark] = OrderedDict()

    def plan(self, benchmark: BenchmarkConfig, *, offline: bool) -> PlannedBenchmark:
        """Return `plan(...)`, cached by its arguments."""
        paths = [*benchmark.include, *filter(None, benchmark.data.values())]
        paths += [text.path for text in benchmark.perplexity.values() if text.path]
        # ImageNet has too many files to check before every run of a sweep.
        if benchmark.images.folder and benchmark.images.data != "imagenet":
            paths.append(benchmark.images.folder)
        stamps = [stamp for path in sorted(paths) for stamp in _stamps(Path(path).expanduser())]
        # JSON is the key, because a config is not hashable.
        key = benchmark.model_dump_json(), tuple(stamps), offline
        if key not in self._plans:
            self._plans[key] = plan(benchmark, offline=offline)
        self._plans.move_to_end(key)
        if len(self._plans) > _CACHED_PLANS:
            self._plans.popitem(last=False)
        return self._plans[key]


_CACHED_PLANS = 4


def _stamps(path: Path) -> Iterator[tuple[str, FileStamp]]:
    """Yield the path and the state of a file, or of every file in a folder."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            yield str(file), file_stamp(file)


def prefetch_benchmark(benchmark: BenchmarkConfig) -> list[str]:
    """Download the data of a benchmark into the usual caches; return the hub data sets.

    Each entry has the name of a hub data set and its commit.
    """
    sources = plan(benchmark, offline=False).sources.values()
    return sorted({f"{s.location}@{s.revision or 'main'}" for s in sources if s.origin == "hub"})


def evaluate(
    model: Model,
    plan: PlannedBenchmark,
    progress: Progress = SILENT,
    cache: ResponseCache | None = None,
) -> Evaluation:
    """Score the model on every task of the plan.

    `cache` holds the responses of an interrupted attempt of this run. Models must not share it.
    """
    # Imported here, because planning and `bench --help` must not load torch.
    from bench.device.devices import seed_everything
    from bench.evaluation.response_cache import ResponseCache

    seed_everything(SEED)
    # The default is an empty cache, because keys do not depend on the weights.
    return _evaluation(plan, plan.harness.score(model, progress, cache or ResponseCache()))


def rescore(plan: PlannedBenchmark, rows: Sequence[SampleRow]) -> Evaluation:
    """Apply the harness's filters and metrics to the answers in sample rows, without a model.

    Raises:
        UserError: the rows lack answers that the metrics need.
    """
    return _evaluation(plan, plan.harness.rescore(rows))


def _evaluation(plan: PlannedBenchmark, scored: ScoredBenchmark) -> Evaluation:
    averages = headline_average(plan.benchmark, scored.metrics)
    gaps = [missing_average(each, scored.metrics) for each in averages if each.value is None]
    report = scored.backend_report
    return Evaluation(
        (*scored.metrics, *averages),
        align_rows(scored.rows),
        backend=None if report is None else report.as_json(),
        missing=(*scored.missing, *gaps),
        evidence=tuple(scored.evidence),
    )
