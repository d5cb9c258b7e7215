"""Evaluating one model on one planned benchmark."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from bench.evaluation.result import Evaluation, Metric
from bench.progress import SILENT, Progress

if TYPE_CHECKING:
    from bench.evaluation.adapter import Adapter
    from bench.evaluation.building import PlannedTask
    from bench.evaluation.planning import Plan
    from bench.models.model import Model

SEED = 1234
"""The harness's own seed for few-shot examples, and ours for sampled generation."""

_BOOTSTRAP = 1000
"""Resamples for a metric without a closed-form standard error; others do not look at it."""


def evaluate(model: Model, plan: Plan, progress: Progress = SILENT) -> Evaluation:
    """Score the model on every task and text of the plan. Nothing is cached between models."""
    from bench.device import seed_everything
    from bench.evaluation import perplexity, samples, scores
    from bench.evaluation.adapter import Adapter

    seed_everything(SEED)
    benchmark = plan.benchmark
    adapter = Adapter(model, benchmark.batch_size, progress)
    metrics: list[Metric] = []
    rows: list[dict[str, Any]] = []
    for task in plan.tasks:
        with progress.phase(f"{model.name} on {task.name}"):
            result = _run(adapter, task, benchmark.limit)
        metrics += scores.metrics(benchmark, task, result)
        rows += samples.rows(task, result)
    metrics += scores.average(benchmark, metrics)
    for text in plan.texts:
        with progress.phase(f"{model.name} on {text.name}"):
            metric, windows = perplexity.measure(model, text, benchmark, progress)
        metrics.append(metric)
        rows += windows
    return Evaluation(tuple(metrics), samples.aligned(rows))


def _run(adapter: Adapter, planned: PlannedTask, limit: int | None) -> dict[str, Any]:
    """Let the harness ask, collect and aggregate.

    Its bootstrap talks to standard output, which belongs to our caller, and would fork this
    process, which holds a device.
    """
    os.environ["DISABLE_MULTIPROC"] = "1"
    from lm_eval.evaluator import evaluate as harness

    from bench.evaluation.quiet import quiet
    from bench.evaluation.templates import compiled_once

    for task in planned.tasks.values():
        task.set_fewshot_seed(SEED)
    with quiet(), compiled_once(), redirect_stdout(io.StringIO()):
        result: dict[str, Any] = harness(
            adapter,
            {"tasks": planned.tasks, "groups": planned.groups},
            limit=limit,
            bootstrap_iters=_BOOTSTRAP,
            log_samples=True,
        )
    return result
