"""Tasks to time: real ones where `SLIMBENCH_REAL_TASKS` names their folder, else the micro ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.evaluation import BenchmarkConfig, plan
from bench.evaluation.text.building import PlannedTask

VARIABLE = "SLIMBENCH_REAL_TASKS"
MICRO = ("arc_easy", "openbookqa", "piqa", "boolq", "winogrande", "hellaswag", "mathqa")


def files() -> dict[str, str]:
    """Return the real tasks' parquet files by task."""
    folder = os.environ.get(VARIABLE)
    found = sorted(Path(folder).glob("*.parquet")) if folder else []
    return {file.stem: str(file) for file in found}


def tasks(limit: int, shots: int = 0) -> list[PlannedTask]:
    """Plan all tasks there are, `limit` documents each."""
    real = files()
    options: dict[str, Any] = {"data": real} if real else {"suite": "micro"}
    config = BenchmarkConfig(
        name="exam", tasks=tuple(real or MICRO), limit=limit, num_fewshot=shots, **options
    )
    return list(plan(config, offline=True).scoring.tasks)  # type: ignore[attr-defined]


def requests(task: PlannedTask, limit: int) -> list[Any]:
    """Return what the harness asks a model, without asking."""
    (inner,) = task.tasks.values()
    inner.set_fewshot_seed(1234)
    inner.build_all_requests(limit=limit, rank=0, world_size=1)
    return list(inner.instances)


def texts(asked: Sequence[Any]) -> list[str]:
    """Return all that is said in some requests."""
    return ["".join(request.args) for request in asked]
