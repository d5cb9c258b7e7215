"""Image-question benchmarks through lmms-eval: planning, evaluation, metrics and sample rows."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from bench.data import hub
from bench.errors import MissingData, UserError, unknown_name
from bench.evaluation.distributed import hidden_from_harness
from bench.evaluation.harness import DocumentSource, SampleRows, ScoredBenchmark
from bench.evaluation.harness_logs import quiet
from bench.evaluation.metrics import TaskMetric
from bench.evaluation.multimodal import derived_metrics
from bench.evaluation.multimodal.adapter import LmmsEvalAdapter
from bench.evaluation.multimodal.planned_tasks import PlannedTask, scoring_unit
from bench.evaluation.response_cache import ResponseCache
from bench.models.model import Model
from bench.schema import BenchmarkConfig, ModelKind
from bench.ui import Progress

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class MultimodalHarness:
    """The planned tasks of one benchmark."""

    benchmark: BenchmarkConfig
    tasks: tuple[PlannedTask, ...]

    kinds: ClassVar[tuple[ModelKind, ...]] = ("image_text",)

    @property
    def sources(self) -> dict[str, DocumentSource]:
        """Where the documents of each task came from."""
        return {task.name: task.source for task in self.tasks}

    def images(self, task: str, document: int) -> list[Image]:
        """Return the images of a document, given its index in the whole data set."""
        (planned,) = (each for each in self.tasks if each.name == task)
        return planned.images(planned.indices.index(document))

    def score(self, model: Model, progress: Progress, memory: ResponseCache) -> ScoredBenchmark:
        """Score the model on every task."""

        return score_image_questions(model, self.benchmark, self.tasks, progress, memory)


def plan_multimodal(benchmark: BenchmarkConfig, *, offline: bool) -> MultimodalHarness:
    """Find and load all tasks of a benchmark.

    Raises:
        MissingData: data are neither cached nor reachable on the hub.
        UserError: the config names a task, a metric or a file that does not exist or fit.
    """
    for name in benchmark.data:
        if name not in benchmark.tasks:
            raise unknown_name("task in benchmark.data", name, benchmark.tasks)
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
    from bench.evaluation.multimodal import planned_tasks

    tasks: list[PlannedTask] = []
    missing: list[str] = []
    for name in dict.fromkeys(benchmark.tasks):
        try:
            tasks.append(planned_tasks.build_task(name, benchmark))
        except hub.DatasetUnreachable as error:
            missing.append(f"{error} ({name})")
    if missing:
        raise _missing_data(benchmark, missing)
    return MultimodalHarness(benchmark, tuple(tasks))


def _missing_data(benchmark: BenchmarkConfig, missing: list[str]) -> MissingData:
    return MissingData(
        f"benchmark {benchmark.name} needs data that are neither cached nor reachable: "
        f"{'; '.join(missing)}. Run `bench prefetch benchmark={benchmark.name}` with a network, or "
        "give local files: benchmark.data.TASK=PATH",
        missing,
    )


def score_image_questions(
    model: Model,
    benchmark: BenchmarkConfig,
    tasks: tuple[PlannedTask, ...],
    progress: Progress,
    memory: ResponseCache,
) -> ScoredBenchmark:
    """Score the model on every task; images are encoded once for all of them."""
    adapter = LmmsEvalAdapter(model, benchmark, progress, memory)
    metrics: list[TaskMetric] = []
    rows: SampleRows = []
    for task in tasks:
        with progress.phase(f"{model.name} on {task.name}"):
            result = _run_harness(adapter, task)
        with quiet():
            metrics += task_metrics(benchmark, task, result)
        rows += sample_rows(task, adapter, result)
    return ScoredBenchmark(metrics, rows, adapter.backend_report)


def _run_harness(adapter: LmmsEvalAdapter, planned: PlannedTask) -> dict[str, Any]:
    """Let lmms-eval build requests, collect responses and aggregate."""
    from lmms_eval.evaluator import evaluate as harness

    # The adapter looks up the images of a request here.
    adapter.task_dict[planned.name] = planned.task.dataset
    with quiet(), hidden_from_harness(), tempfile.TemporaryDirectory() as folder:
        # The harness insists on writing files next to its results; they go to a folder that is
        # dropped. `torchrun` is the executor backend that sets up nothing in a single process.
        settings = SimpleNamespace(output_path=folder, process_with_media=False)
        result: dict[str, Any] = harness(
            adapter,
            {planned.name: planned.task},
            bootstrap_iters=0,
            log_samples=True,
            cli_args=settings,
            distributed_executor_backend="torchrun",
            process_docs_parallel=1,
        )
    return result


MEAN_METRICS = frozenset({"pope_accuracy"})
"""Metrics that are the mean of a score per sample, although their samples are not numbers."""


def task_metrics(
    benchmark: BenchmarkConfig, planned: PlannedTask, result: dict[str, Any]
) -> list[TaskMetric]:
    """Return every metric of a task, those of the harness first."""
    samples = result["samples"][planned.name]
    row = partial(_metric, benchmark, planned)
    scored = result["results"][planned.name]
    found = _harness_metrics(row, planned, scored, samples)
    found += [
        row(each.metric, "none", each.value, each.stderr, each.n)
        for each in derived_metrics.derive_metrics(samples, scored)
    ]
    return found


def _harness_metrics(
    row: Callable[..., TaskMetric],
    planned: PlannedTask,
    scores: dict[str, Any],
    samples: list[dict[str, Any]],
) -> list[TaskMetric]:
    found = []
    for metric in planned.task.aggregation():
        keys = [key for key in scores if key.partition(",")[0] == metric]
        for key in keys:
            through = key.partition(",")[2]
            answered = [sample[metric] for sample in samples if metric in sample]
            # The harness's CLT standard error holds for a mean of per-sample scores; for any other
            # aggregate it would be the error of something else, so it is dropped.
            is_mean = metric in MEAN_METRICS or all(isinstance(a, int | float) for a in answered)
            error = scores.get(f"{metric}_stderr_clt,{through}") if is_mean else None
            stderr = None if isinstance(error, str | None) else float(error)
            found.append(row(metric, through, float(scores[key]), stderr, len(answered)))
    return found


def _metric(
    benchmark: BenchmarkConfig,
    planned: PlannedTask,
    metric: str,
    through: str,
    value: float,
    stderr: float | None,
    n: int,
) -> TaskMetric:
    return TaskMetric(
        benchmark=benchmark.name,
        task=planned.name,
        metric=metric,
        filter=through,
        shots=0,
        split=planned.split,
        value=value,
        stderr=stderr,
        n=n,
        higher_is_better=planned.task.higher_is_better().get(metric, True),
        headline=metric == planned.headline,
        task_version=_version(planned.task.config.metadata),
    )


def _version(metadata: Any) -> str | None:
    """Return a task's version; its file holds a mapping or a list of mappings."""
    parts = metadata if isinstance(metadata, list) else [metadata or {}]
    versions = [str(part["version"]) for part in parts if "version" in part]
    return versions[0] if versions else None


def sample_rows(
    planned: PlannedTask, adapter: LmmsEvalAdapter, result: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return one row per scored document; `doc_id` is its index in the whole data set."""
    return [_sample_row(planned, adapter, sample) for sample in result["samples"][planned.name]]


def _sample_row(
    planned: PlannedTask, adapter: LmmsEvalAdapter, sample: dict[str, Any]
) -> dict[str, Any]:
    asked = adapter.answers_by_document[planned.name, sample["doc_id"]]
    metrics = {name: _number(sample[name]) for name in planned.task.aggregation() if name in sample}
    return {
        "task": planned.name,
        "filter": "none",
        # The harness counts the documents it was given; with a limit these need not be the first
        # ones of the data set, and records of different limits must pair by document.
        "doc_id": planned.indices[sample["doc_id"]],
        "doc_hash": _sha256(json.dumps(sample["doc"], sort_keys=True, default=str)),
        "prompt_hash": _sha256(asked.prompt),
        "target": _target(sample),
        "prompt": asked.prompt,
        "response": str(sample["filtered_resps"][0]),
        "image_hash": asked.image_hash,
        "category": sample["doc"].get("category"),
        "unit": scoring_unit(planned.name, sample["doc"]),
        **metrics,
    }


def _target(sample: dict[str, Any]) -> str:
    """Return the reference answer; of ten annotators' answers the most frequent one.

    lmms-eval logs the word `answer` in that case, the name of a column that these data sets lack.
    """
    answers = sample["doc"].get("answers")
    if not answers:
        return str(sample["target"])
    given = [answer["answer"] if isinstance(answer, dict) else answer for answer in answers]
    return str(Counter(given).most_common(1)[0][0])


def _number(value: Any) -> float | None:
    """Return a sample's own score, or None if it is defined over several samples only."""
    if isinstance(value, dict):
        value = value.get("score")
    return float(value) if isinstance(value, int | float) else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
