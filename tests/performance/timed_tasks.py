"""Tasks to time: the nine embedded ones, and real ones where `SLIMBENCH_REAL_TASKS` names them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.data.synthetic.world import TASKS
from bench.evaluation import BenchmarkConfig, plan
from bench.evaluation.task_planning import quiet_lm_eval
from bench.evaluation.text.lm_eval import cached_templates
from bench.evaluation.text.planned_tasks import PlannedTask

VARIABLE = "SLIMBENCH_REAL_TASKS"
"""A folder of parquet files, each named as the lm-eval task whose evaluated split it is."""


def files() -> dict[str, str]:
    """Return the real tasks' parquet files by task."""
    folder = os.environ.get(VARIABLE)
    found = sorted(Path(folder).glob("*.parquet")) if folder else []
    return {file.stem: str(file) for file in found}


def names() -> list[str]:
    """Return what every exam is called; the embedded ones are `micro_TASK`."""
    return [*files(), *(f"micro_{task}" for task in TASKS)]


def task(name: str, shots: int = 0) -> PlannedTask:
    """Plan the task of one exam."""
    inner = name.removeprefix("micro_")
    embedded = inner != name
    options: dict[str, Any] = {"suite": "micro"} if embedded else {"data": {inner: files()[inner]}}
    config = BenchmarkConfig(name="exam", tasks=(inner,), num_fewshot=shots, **options)
    (planned,) = plan(config, offline=True).harness.tasks  # type: ignore[attr-defined]
    return planned


def requests(planned: PlannedTask, limit: int | None) -> list[Any]:
    """Return what the harness asks a model about the first documents, without asking."""
    (inner,) = planned.tasks.values()
    inner.set_fewshot_seed(1234)
    with quiet_lm_eval(), cached_templates():
        inner.build_all_requests(limit=limit, rank=0, world_size=1)
    return list(inner.instances)


def texts(asked: Sequence[Any]) -> Iterator[str]:
    """Return all that is said in some requests."""
    return ("".join(request.args) for request in asked)
