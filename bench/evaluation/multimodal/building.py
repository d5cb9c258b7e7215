"""lmms-eval's task objects for the names that a benchmark lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL.Image import Image

from bench.errors import UserError, unknown
from bench.evaluation.config import BenchmarkConfig
from bench.evaluation.multimodal import catalog, definition, derived, documents
from bench.evaluation.multimodal.documents import Documents
from bench.evaluation.multimodal.quiet import quiet
from bench.evaluation.multimodal.selection import select
from bench.evaluation.multimodal.task import LoadedTask
from bench.evaluation.source import Source


@dataclass(frozen=True)
class PlannedTask:
    """One task with its documents.

    `places` are the indices of its documents in the whole data set, `headline` is its metric.
    """

    name: str
    task: LoadedTask
    split: str
    places: tuple[int, ...]
    source: Source
    headline: str

    def pictures(self, number: int) -> list[Image]:
        """Return the images shown with a document, given its index into `places`."""
        with quiet():
            return list(self.task.doc_to_visual(self.task.dataset[self.split][number]))


def build(name: str, benchmark: BenchmarkConfig) -> PlannedTask:
    """Build one task.

    Raises:
        Unreachable: its data are neither cached nor reachable on the hub.
        UserError: the task is not supported, or the user's rows or metric do not fit it.
    """
    find = catalog.find_micro if benchmark.suite == "micro" else catalog.find
    with quiet():
        defined = definition.read(find(name), benchmark)
        found = documents.load(name, defined, benchmark)
        places = select(name, found.rows, benchmark.limit)
        task = _task(name, _bound(defined, found), found, places, benchmark)
    headline = _headline(name, list(task.aggregation()), benchmark)
    split = definition.evaluated_split(defined)
    return PlannedTask(name, task, split, tuple(places), found.source, headline)


def _bound(defined: dict[str, Any], found: Documents) -> dict[str, Any]:
    """Point a task at its images; the harness's own function would load them from the hub."""
    bound = {**defined, "dataset_kwargs": None, "num_fewshot": 0}
    for key in ("test_split", "validation_split"):
        bound[key] = str(bound[key]).strip() if bound.get(key) else None
    # Only the scored split is loaded, so the harness must not look for others.
    bound["training_split"] = bound["fewshot_split"] = None
    if found.album is not None:
        bound["doc_to_visual"] = found.album.doc_to_visual
    return bound


def _task(
    name: str,
    defined: dict[str, Any],
    found: Documents,
    places: list[int],
    benchmark: BenchmarkConfig,
) -> LoadedTask:
    rows = found.rows.select(places)
    if name not in benchmark.data:
        return LoadedTask(defined, rows)
    try:
        task = LoadedTask(defined, rows)
        # Tried on one row now: otherwise the first failure would come after the model is loaded.
        task.doc_to_visual(rows[0])
    except Exception as error:  # task functions raise anything on such rows
        reason = f"{type(error).__name__} {error}"
        key = f"benchmark.data.{name}={benchmark.data[name]}"
        raise UserError(f"{key}: the rows do not fit {name}: {reason}") from error
    return task


def _headline(name: str, offered: list[str], benchmark: BenchmarkConfig) -> str:
    """Return the metric that represents a task: the configured one, or the harness's first."""
    metrics = [*offered, *derived.offered(offered)]
    metric = benchmark.metrics.get(name, metrics[0])
    if metric not in metrics:
        raise unknown(f"metric benchmark.metrics.{name}", metric, metrics)
    return metric
