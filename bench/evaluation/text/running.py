"""Text benchmarks run through lm-eval, and perplexities measured alongside."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from typing import Any

from bench.evaluation.config import BenchmarkConfig
from bench.evaluation.memory import Memory
from bench.evaluation.result import Metric
from bench.evaluation.scoring import Rows, Scores
from bench.evaluation.seeding import SEED
from bench.evaluation.text import perplexity, samples, scores
from bench.evaluation.text.adapter import Adapter
from bench.evaluation.text.building import PlannedTask
from bench.evaluation.text.templates import compiled_once
from bench.evaluation.text.texts import PlannedText
from bench.models.model import Model
from bench.progress import Progress

_BOOTSTRAP = 1000
"""Resamples for metrics without a closed-form standard error; others ignore it."""


def score(
    model: Model,
    benchmark: BenchmarkConfig,
    tasks: tuple[PlannedTask, ...],
    texts: tuple[PlannedText, ...],
    progress: Progress,
    memory: Memory,
) -> Scores:
    """Score the model on every task and text; requests in the response cache are skipped."""
    # One adapter for all tasks: choosing its scorer runs a numerical probe and estimates free
    # memory.
    adapter = Adapter(model, benchmark.batch_size, progress, benchmark.engine, memory)
    metrics: list[Metric] = []
    rows: Rows = []
    for task in tasks:
        with progress.phase(f"{model.name} on {task.name}"), compiled_once():
            result = _run(adapter, task, benchmark.limit)
            rows += samples.rows(task, result)
        metrics += scores.metrics(benchmark, task, result)
    for text in texts:
        with progress.phase(f"{model.name} on {text.name}"):
            metric, windows = perplexity.measure(model, text, benchmark, progress, memory)
        metrics.append(metric)
        rows += windows
    return Scores(metrics, rows, adapter.asked)


def _run(adapter: Adapter, planned: PlannedTask, limit: int | None) -> dict[str, Any]:
    """Let lm-eval build requests, collect responses and aggregate."""
    # lm-eval's bootstrap would fork this process, which holds a device and threads. The variable
    # stays set for the rest of the process.
    os.environ["DISABLE_MULTIPROC"] = "1"
    from lm_eval.evaluator import evaluate as harness

    from bench.evaluation.text.quiet import quiet

    for task in planned.tasks.values():
        task.set_fewshot_seed(SEED)
    # The bootstrap also prints, and standard output belongs to our caller (`--json`).
    with quiet(), redirect_stdout(io.StringIO()):
        result: dict[str, Any] = harness(
            adapter,
            {"tasks": planned.tasks, "groups": planned.groups},
            limit=limit,
            bootstrap_iters=_BOOTSTRAP,
            log_samples=True,
        )
    return result
