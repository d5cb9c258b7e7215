"""Everything a benchmark needs, found before a model is loaded: tasks, data, fingerprints."""

from __future__ import annotations

import functools
import pkgutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bench.errors import UserError
from bench.evaluation.config import BenchmarkConfig

if TYPE_CHECKING:
    from bench.evaluation.scoring import Scoring
    from bench.evaluation.source import Source
    from bench.models.config import ModelConfig


PLANNERS = {
    "lm_eval": "bench.evaluation.text.planning:plan_text",
    "lmms_eval": "bench.evaluation.multimodal.planning:plan_multimodal",
    "images": "bench.evaluation.images.planning:plan_images",
}


class Planner(Protocol):
    """What finds the data of one harness's benchmarks."""

    def __call__(self, benchmark: BenchmarkConfig, *, offline: bool) -> Scoring:
        """Return the benchmark, ready to score any model."""


@dataclass(frozen=True)
class Plan:
    """A benchmark whose data are all there; any number of models can be evaluated on it."""

    benchmark: BenchmarkConfig
    scoring: Scoring

    @property
    def sources(self) -> dict[str, Source]:
        """Where each task's and each text's documents came from."""
        return self.scoring.sources

    @property
    def fingerprints(self) -> dict[str, str]:
        """A fingerprint of the documents per task and per text."""
        return {name: source.fingerprint for name, source in self.sources.items()}

    @property
    def provenance(self) -> dict[str, dict[str, Any]]:
        """What a record keeps of the sources: origin, location, revision and fingerprint."""
        return {name: asdict(source) for name, source in self.sources.items()}

    def refuse_unfit(self, model: ModelConfig) -> None:
        """Raise unless the benchmark's harness can ask a model of this kind."""
        if model.kind not in self.scoring.kinds:
            raise UserError(
                f"benchmark={self.benchmark.name} asks models of kind "
                f"{' or '.join(self.scoring.kinds)}, but model={model.name} is of kind {model.kind}"
            )


def plan(benchmark: BenchmarkConfig, *, offline: bool) -> Plan:
    """Find and load all data of a benchmark; what is missing is named at once, all of it.

    With no network, or with `offline`, the process stays off the hub from then on.

    Raises:
        MissingData: data are neither cached nor to be had from the hub.
        UserError: a task, a metric, a file or a text is not what the config takes it for.
    """
    return Plan(benchmark, _scoring(benchmark, offline=offline))


def _scoring(benchmark: BenchmarkConfig, *, offline: bool) -> Scoring:
    """Let the harness of a benchmark plan it; the others are not even imported."""
    planner: Planner = pkgutil.resolve_name(PLANNERS[benchmark.harness])
    return planner(benchmark, offline=offline)


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
