"""Image-question benchmarks run through lmms-eval."""

from __future__ import annotations

import tempfile
from types import SimpleNamespace
from typing import Any

from bench.evaluation.config import BenchmarkConfig
from bench.evaluation.memory import Memory
from bench.evaluation.multimodal import samples, scores
from bench.evaluation.multimodal.adapter import Adapter
from bench.evaluation.multimodal.building import PlannedTask
from bench.evaluation.multimodal.quiet import quiet
from bench.evaluation.ranks import unseen
from bench.evaluation.result import Metric
from bench.evaluation.scoring import Rows, Scores
from bench.models.model import Model
from bench.progress import Progress


def score(
    model: Model,
    benchmark: BenchmarkConfig,
    tasks: tuple[PlannedTask, ...],
    progress: Progress,
    memory: Memory,
) -> Scores:
    """Score the model on every task; images are encoded once for all of them."""
    adapter = Adapter(model, benchmark, progress, memory)
    metrics: list[Metric] = []
    rows: Rows = []
    for task in tasks:
        with progress.phase(f"{model.name} on {task.name}"):
            result = _run(adapter, task)
        with quiet():
            metrics += scores.metrics(benchmark, task, result)
        rows += samples.rows(task, adapter, result)
    return Scores(metrics, rows, adapter.engine)


def _run(adapter: Adapter, planned: PlannedTask) -> dict[str, Any]:
    """Let lmms-eval build requests, collect responses and aggregate."""
    from lmms_eval.evaluator import evaluate as harness

    # The adapter looks up the images of a request here.
    adapter.task_dict[planned.name] = planned.task.dataset
    with quiet(), unseen(), tempfile.TemporaryDirectory() as folder:
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
