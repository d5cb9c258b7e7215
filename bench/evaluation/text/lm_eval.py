"""Text benchmarks through lm-eval: planned, run, its results as metrics and sample rows."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, ClassVar

import lm_eval.utils

from bench.data import hub
from bench.errors import MissingData, unknown_name
from bench.evaluation.harness import SEED, DocumentSource, SampleRows, ScoredBenchmark
from bench.evaluation.harness_logs import quiet_lm_eval
from bench.evaluation.metrics import TaskMetric, common_split
from bench.evaluation.response_cache import ResponseCache
from bench.evaluation.text import perplexity, planned_tasks, task_data
from bench.evaluation.text.adapter import LmEvalAdapter
from bench.evaluation.text.planned_tasks import PlannedTask
from bench.evaluation.text.task_data import PlannedText
from bench.evaluation.text.task_index import evaluated_split
from bench.models.model import Model
from bench.schema import BenchmarkConfig, ModelKind
from bench.ui import Progress


@dataclass(frozen=True)
class TextHarness:
    """The planned tasks and texts of one benchmark."""

    benchmark: BenchmarkConfig
    tasks: tuple[PlannedTask, ...]
    texts: tuple[PlannedText, ...]

    kinds: ClassVar[tuple[ModelKind, ...]] = ("causal_lm", "image_text")

    @property
    def sources(self) -> dict[str, DocumentSource]:
        """Where the documents of each task and each text came from."""
        found = {name: source for task in self.tasks for name, source in task.sources.items()}
        return found | {text.name: text.source for text in self.texts}

    def images(self, task: str, document: int) -> tuple[()]:
        """Return nothing: documents are texts."""
        return ()

    def score(self, model: Model, progress: Progress, memory: ResponseCache) -> ScoredBenchmark:
        """Score the model on every task and text."""

        return score_text(model, self.benchmark, self.tasks, self.texts, progress, memory)


def plan_text(benchmark: BenchmarkConfig, *, offline: bool) -> TextHarness:
    """Find and load all tasks and texts of a benchmark.

    Raises:
        MissingData: data are neither cached nor reachable on the hub.
        UserError: the config names a task, a metric, a file or a text that does not exist or fit.
    """
    scored = planned_tasks.scored_names(benchmark)
    for name in benchmark.data:
        if name not in scored:
            raise unknown_name("task in benchmark.data", name, scored)
    # Decided once for the process: without this, every data set would wait for its own timeout.
    if offline or (_needs_hub(benchmark) and not hub.is_reachable()):
        hub.go_offline()
    tasks: list[PlannedTask] = []
    loaded: list[PlannedText] = []
    # All failures are collected before any is reported: a user should not have to fix them one run
    # at a time.
    missing: list[str] = []
    for name in scored:
        try:
            tasks.append(planned_tasks.build_task(name, benchmark))
        except hub.DatasetUnreachable as error:
            missing.append(f"{error} ({name})")
    for name, config in benchmark.perplexity.items():
        try:
            with quiet_lm_eval():
                loaded.append(task_data.load_perplexity_text(name, config))
        except hub.DatasetUnreachable as error:
            missing.append(f"{error} ({name})")
    if missing:
        raise _missing_data(benchmark, missing)
    return TextHarness(benchmark, tuple(tasks), tuple(loaded))


def _needs_hub(benchmark: BenchmarkConfig) -> bool:
    real = benchmark.suite == "real" and set(benchmark.tasks) - set(benchmark.data)
    texts = benchmark.perplexity.values()
    return bool(real) or any(text.text != "english" and not text.path for text in texts)


def _missing_data(benchmark: BenchmarkConfig, missing: list[str]) -> MissingData:
    return MissingData(
        f"benchmark {benchmark.name} needs data that are neither cached nor reachable: "
        f"{'; '.join(missing)}. Run `bench prefetch benchmark={benchmark.name}` with a network, or "
        "give local files: benchmark.data.TASK=PATH, benchmark.perplexity.NAME.path=PATH",
        missing,
    )


_BOOTSTRAP_RESAMPLES = 1000
"""Resamples for metrics without a closed-form standard error; others ignore it."""


def score_text(
    model: Model,
    benchmark: BenchmarkConfig,
    tasks: tuple[PlannedTask, ...],
    texts: tuple[PlannedText, ...],
    progress: Progress,
    memory: ResponseCache,
) -> ScoredBenchmark:
    """Score the model on every task and text; requests in the response cache are skipped."""
    # One adapter for all tasks: choosing its scorer runs a numerical probe and estimates free
    # memory.
    adapter = LmEvalAdapter(model, benchmark.batch_size, progress, benchmark.backend, memory)
    metrics: list[TaskMetric] = []
    rows: SampleRows = []
    for task in tasks:
        with progress.phase(f"{model.name} on {task.name}"), cached_templates():
            result = _run_harness(adapter, task, benchmark.limit)
            rows += sample_rows(task, result)
        metrics += task_metrics(benchmark, task, result)
    for text in texts:
        with progress.phase(f"{model.name} on {text.name}"):
            metric, windows = perplexity.measure_perplexity(
                model, text, benchmark, progress, memory
            )
        metrics.append(metric)
        rows += windows
    return ScoredBenchmark(metrics, rows, adapter.backend_report)


def _run_harness(adapter: LmEvalAdapter, planned: PlannedTask, limit: int | None) -> dict[str, Any]:
    """Let lm-eval build requests, collect responses and aggregate."""
    # lm-eval's bootstrap would fork this process, which holds a device and threads. The variable
    # stays set for the rest of the process.
    os.environ["DISABLE_MULTIPROC"] = "1"
    from lm_eval.evaluator import evaluate as harness

    from bench.evaluation.harness_logs import quiet_lm_eval

    for task in planned.tasks.values():
        task.set_fewshot_seed(SEED)
    # The bootstrap also prints, and standard output belongs to our caller (`--json`).
    with quiet_lm_eval(), redirect_stdout(io.StringIO()):
        result: dict[str, Any] = harness(
            adapter,
            {"tasks": planned.tasks, "groups": planned.groups},
            limit=limit,
            bootstrap_iters=_BOOTSTRAP_RESAMPLES,
            log_samples=True,
        )
    return result


def task_metrics(
    benchmark: BenchmarkConfig, planned: PlannedTask, result: dict[str, Any]
) -> list[TaskMetric]:
    """Return every metric that the harness reports for a task, or for a group and its tasks."""
    rows: list[TaskMetric] = []
    for name, scores in result["results"].items():
        # Results are keyed `METRIC,FILTER`; standard errors stand among them as
        # `METRIC_stderr,FILTER`, and keys without a comma are labels and counts.
        keys = [key for key in scores if "," in key and "_stderr," not in key]
        shown = _headline_key(planned, keys) if name == planned.name else None
        rows += [
            _metric(benchmark, planned, result, name, key, headline=key == shown) for key in keys
        ]
    return rows


def _headline_key(planned: PlannedTask, keys: Sequence[str]) -> str | None:
    metric, chosen = planned.headline
    wanted = [key for key in keys if key.partition(",")[0] == metric]
    return next((key for key in wanted if chosen in (None, key.partition(",")[2])), None)


def _metric(
    benchmark: BenchmarkConfig,
    planned: PlannedTask,
    result: dict[str, Any],
    name: str,
    key: str,
    *,
    headline: bool,
) -> TaskMetric:
    metric, _, through = key.partition(",")
    scores = result["results"][name]
    # The value is "N/A" where the harness computed none.
    error = scores.get(f"{metric}_stderr,{through}")
    better = result["higher_is_better"].get(name, {}).get(metric)
    version = result["versions"].get(name)
    leaves = _leaf_tasks(planned, name)
    return TaskMetric(
        benchmark=benchmark.name,
        task=name,
        metric=metric,
        filter=through,
        shots=int(result["n-shot"].get(name) or 0),
        split=common_split({evaluated_split(vars(planned.tasks[leaf].config)) for leaf in leaves}),
        value=float(scores[key]),
        stderr=float(error) if isinstance(error, float) else None,
        n=sum(result["n-samples"][leaf]["effective"] for leaf in leaves),
        higher_is_better=better is not False,
        headline=headline,
        task_version=None if version in (None, "N/A") else str(version),
    )


def _leaf_tasks(planned: PlannedTask, name: str) -> list[str]:
    """Return the tasks that a row covers: itself, or the tasks below a group."""
    if name in planned.tasks:
        return [name]
    return [task.task_name for task in planned.groups[name].get_all_tasks()]


def sample_rows(planned: PlannedTask, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per scored document and filter."""
    return [
        _sample_row(name, planned.tasks[name], sample)
        for name, samples in result["samples"].items()
        for sample in samples
    ]


def _sample_row(name: str, task: Any, sample: dict[str, Any]) -> dict[str, Any]:
    first = sample["arguments"][0]
    return {
        "task": name,
        "filter": sample["filter"],
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "prompt_hash": sample["prompt_hash"],
        "target": str(sample["target"]),
        "prompt": first[0],
        "choices": _choices(task, sample),
        **_raw_responses(task, sample),
        **{name: _number(sample[name]) for name in sample["metrics"]},
    }


def _choices(task: Any, sample: dict[str, Any]) -> list[str]:
    if task.OUTPUT_TYPE == "multiple_choice":
        return [str(choice) for choice in task.doc_to_choice(sample["doc"])]
    if task.OUTPUT_TYPE == "loglikelihood":
        return [argument[1] for argument in sample["arguments"]]
    return []


def _raw_responses(task: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """Return the model's raw responses, before any filter: scores of choices, or a text."""
    answers = [responses[0] for responses in sample["resps"]]
    if task.OUTPUT_TYPE == "generate_until":
        # The exception: a generated text is shown as its filter left it, since that is what was
        # scored.
        filtered = sample["filtered_resps"][0]
        return {"response": filtered if isinstance(filtered, str) else answers[0]}
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return {"loglikelihoods": [float(answer) for answer in answers]}
    return {
        "loglikelihoods": [float(value) for value, _ in answers],
        "greedy": [bool(greedy) for _, greedy in answers],
    }


def _number(value: Any) -> float | None:
    """Return a sample's metric, or None if it is defined over many samples only."""
    # Corpus metrics (BLEU, F1 and the like) log a tuple of references and predictions per sample.
    return float(value) if isinstance(value, int | float) else None


@contextmanager
def cached_templates() -> Iterator[None]:
    """Cache compiled templates while the block runs; prompts do not change."""
    environment = lm_eval.utils.env
    # Safe, because a compiled template holds no state of a document, and the environment is a
    # module global that lives as long as lm-eval.
    environment.from_string = functools.cache(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # the instance attribute; the method of the class is back
