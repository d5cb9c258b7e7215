"""Evaluating one model on one planned benchmark."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.evaluation.result import Evaluation
from bench.evaluation.seeding import SEED
from bench.progress import SILENT, Progress

if TYPE_CHECKING:
    from bench.evaluation.memory import Memory
    from bench.evaluation.planning import Plan
    from bench.models.model import Model


def evaluate(
    model: Model, plan: Plan, progress: Progress = SILENT, memory: Memory | None = None
) -> Evaluation:
    """Score the model on every task of the plan; `memory` holds what it answered before a kill.

    Nothing is kept between models: a memory is one run's own.
    """
    from bench.device import seed_everything
    from bench.evaluation.average import average
    from bench.evaluation.memory import Memory
    from bench.evaluation.rows import aligned

    seed_everything(SEED)
    metrics, rows, asked = plan.scoring.score(model, progress, memory or Memory())
    metrics += average(plan.benchmark, metrics)
    engine = None if asked is None else asked.plain()
    return Evaluation(tuple(metrics), aligned(rows), engine)
