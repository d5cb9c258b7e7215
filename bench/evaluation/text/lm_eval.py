"""Text benchmarks through lm-eval: planning, evaluation, metrics and sample rows."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypedDict

import lm_eval.utils

from bench.evaluation.harness import SEED, DocumentSource, ScoredBenchmark
from bench.evaluation.harness_logs import quiet_lm_eval
from bench.evaluation.metrics import (
    LoggedSample,
    SampleRow,
    common_split,
    sample_score,
    task_metric,
)
from bench.evaluation.response_cache import ResponseCache
from bench.evaluation.task_planning import (
    collect,
    evaluated_split,
    go_offline_if_needed,
    reads_hub,
    refuse_missing_data,
    refuse_unknown_data,
)
from bench.evaluation.text import perplexity, planned_tasks, task_data
from bench.evaluation.text.adapter import LmEvalAdapter
from bench.evaluation.text.planned_tasks import PlannedTask
from bench.evaluation.text.task_data import PlannedText
from bench.evaluation.text.task_index import TextTask
from bench.models.model import Model
from bench.records.record import Metric
from bench.schema import BenchmarkConfig, ModelKind
from bench.ui import Progress

_BOOTSTRAP_RESAMPLES = 1000
"""Resamples for metrics without a closed-form standard error; others ignore it."""
HarnessResult = TypedDict(
    "HarnessResult",
    {
        "results": dict[str, dict[str, float | str]],
        "higher_is_better": dict[str, dict[str, bool | None]],
        "versions": dict[str, float | str | None],
        "n-shot": dict[str, int | None],
        "n-samples": dict[str, dict[str, int]],
        "samples": dict[str, list[LoggedSample]],
    },
)
"""Results of lm-eval: scores by task or group, their labels, and the scored documents."""


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
        of_tasks = {name: source for task in self.tasks for name, source in task.sources.items()}
        return of_tasks | {text.name: text.source for text in self.texts}

    @property
    def definitions(self) -> dict[str, str]:
        """Hash of each task's definition, those of a group's members included."""
        return {name: found for task in self.tasks for name, found in task.definitions.items()}

    @property
    def folders(self) -> frozenset[Path]:
        """Folders of the harness's task files and of their code."""
        return frozenset().union(*(task.folders for task in self.tasks))

    def images(self, task: str, document: int) -> tuple[()]:
        """Return nothing: documents are texts."""
        return ()

    def score(self, model: Model, progress: Progress, cache: ResponseCache) -> ScoredBenchmark:
        """Score the model on every task and text; cached requests are skipped."""
        benchmark = self.benchmark
        # One adapter for all tasks: choosing its scorer runs a numerical probe and estimates free
        # memory.
        adapter = LmEvalAdapter(model, benchmark.batch_size, progress, benchmark.backend, cache)
        metrics: list[Metric] = []
        rows: list[SampleRow] = []
        for task in self.tasks:
            with progress.phase(f"{model.name} on {task.name}"), cached_templates():
                result = _run_harness(adapter, task, benchmark.limit)
                rows += sample_rows(task, result)
            metrics += task_metrics(benchmark, task, result)
        for text in self.texts:
            with progress.phase(f"{model.name} on {text.name}"):
                metric, windows = perplexity.measure_perplexity(
                    model, text, benchmark, progress, cache
                )
            metrics.append(metric)
            rows += windows
        return ScoredBenchmark(metrics, rows, adapter.backend_report)


def plan_text(benchmark: BenchmarkConfig, *, offline: bool) -> TextHarness:
    """Find and load all tasks and texts of a benchmark.

    Raises:
        MissingData: data are neither cached nor reachable on the hub.
        UserError: the config names a task, a metric, a file or a text that does not exist or fit.
    """
    scored = planned_tasks.scored_names(benchmark)
    refuse_unknown_data(benchmark, scored)
    texts = benchmark.perplexity
    hub_texts = any(text.text != "english" and not text.path for text in texts.values())
    go_offline_if_needed(offline=offline, needs_hub=reads_hub(benchmark) or hub_texts)

    def load_text(name: str) -> PlannedText:
        with quiet_lm_eval():
            return task_data.load_perplexity_text(name, texts[name])

    missing: list[str] = []
    tasks = collect(scored, lambda name: planned_tasks.build_task(name, benchmark), missing)
    loaded = collect(texts, load_text, missing)
    refuse_missing_data(
        benchmark, missing, "benchmark.data.TASK=PATH, benchmark.perplexity.NAME.path=PATH"
    )
    return TextHarness(benchmark, tuple(tasks), tuple(loaded))


def _run_harness(adapter: LmEvalAdapter, planned: PlannedTask, limit: int | None) -> HarnessResult:
    """Let lm-eval build requests, collect responses and aggregate."""
    from lm_eval.evaluator import evaluate

    for task in planned.tasks.values():
        task.set_fewshot_seed(SEED)
    # The bootstrap also prints, and standard output belongs to our caller (`--json`).
    with quiet_lm_eval(), redirect_stdout(io.StringIO()), bootstrap_in_this_process():
        result: HarnessResult = evaluate(
            adapter,
            {"tasks": planned.tasks, "groups": planned.groups},
            limit=limit,
            bootstrap_iters=_BOOTSTRAP_RESAMPLES,
            log_samples=True,
        )
    return result


@contextmanager
def bootstrap_in_this_process() -> Iterator[None]:
    """Keep lm-eval from forking this process, which holds a device and threads."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def task_metrics(
    benchmark: BenchmarkConfig, planned: PlannedTask, result: HarnessResult
) -> list[Metric]:
    """Return every metric that the harness reports for a task, or for a group and its tasks."""
    metrics: list[Metric] = []
    for name, scores in result["results"].items():
        # Results are keyed `METRIC,FILTER`; standard errors stand among them as
        # `METRIC_stderr,FILTER`, and keys without a comma are labels and counts.
        keys = [key for key in scores if "," in key and "_stderr," not in key]
        headline = _headline_key(planned, keys) if name == planned.name else None
        metrics += [
            _metric(benchmark, planned, result, name, key, headline=key == headline) for key in keys
        ]
    return metrics


def _headline_key(planned: PlannedTask, keys: Sequence[str]) -> str | None:
    metric, through = planned.headline
    candidates = [key for key in keys if key.partition(",")[0] == metric]
    return next((key for key in candidates if through in (None, key.partition(",")[2])), None)


def _metric(
    benchmark: BenchmarkConfig,
    planned: PlannedTask,
    result: HarnessResult,
    name: str,
    key: str,
    *,
    headline: bool,
) -> Metric:
    metric, _, through = key.partition(",")
    scores = result["results"][name]
    # The value is "N/A" where the harness computed none.
    error = scores.get(f"{metric}_stderr,{through}")
    better = result["higher_is_better"].get(name, {}).get(metric)
    version = result["versions"].get(name)
    leaves = _leaf_tasks(planned, name)
    return task_metric(
        benchmark,
        name,
        metric,
        float(scores[key]),
        through=through,
        shots=int(result["n-shot"].get(name) or 0),
        split=common_split({evaluated_split(vars(planned.tasks[leaf].config)) for leaf in leaves}),
        stderr=float(error) if isinstance(error, float) else None,
        n=sum(result["n-samples"][leaf]["effective"] for leaf in leaves),
        # Undeclared counts as True, the rule of nearly all metrics of lm-eval.
        higher_is_better=better is not False,
        headline=headline,
        task_version=None if version in (None, "N/A") else str(version),
    )


def _leaf_tasks(planned: PlannedTask, name: str) -> list[str]:
    """Return the tasks that a row covers: itself, or the tasks below a group."""
    if name in planned.tasks:
        return [name]
    return [task.task_name for task in planned.groups[name].get_all_tasks()]


def sample_rows(planned: PlannedTask, result: HarnessResult) -> list[SampleRow]:
    """Return one row per scored document and filter."""
    return [
        _sample_row(name, planned.tasks[name], sample)
        for name, samples in result["samples"].items()
        for sample in samples
    ]


def _sample_row(name: str, task: TextTask, sample: LoggedSample) -> SampleRow:
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
        **{metric: sample_score(sample[metric]) for metric in sample["metrics"]},
    }


def _choices(task: TextTask, sample: LoggedSample) -> list[str]:
    if task.OUTPUT_TYPE == "multiple_choice":
        return [str(choice) for choice in task.doc_to_choice(sample["doc"])]
    if task.OUTPUT_TYPE == "loglikelihood":
        return [argument[1] for argument in sample["arguments"]]
    return []


def _raw_responses(task: TextTask, sample: LoggedSample) -> SampleRow:
    """Return the model's raw responses, before any filter: scores of choices, or a text."""
    raw = [responses[0] for responses in sample["resps"]]
    if task.OUTPUT_TYPE == "generate_until":
        # The exception: a generated text is shown as its filter left it, since that is what was
        # scored.
        filtered = sample["filtered_resps"][0]
        return {"response": filtered if isinstance(filtered, str) else raw[0]}
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return {"loglikelihoods": [float(value) for value in raw]}
    return {
        "loglikelihoods": [float(value) for value, _ in raw],
        "greedy": [bool(greedy) for _, greedy in raw],
    }


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
