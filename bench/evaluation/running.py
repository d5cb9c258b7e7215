"""Evaluation of one model on one planned benchmark."""

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
    """Score the model on every task of the plan.

    `memory` is the response cache of this run, holding what an interrupted attempt had answered. A
    cache is never shared between models.
    """
    # Imported late: planning and `bench --help` import this package and must not load torch.
    from bench.device import seed_everything
    from bench.evaluation.average import average
    from bench.evaluation.memory import Memory
    from bench.evaluation.rows import aligned

    seed_everything(SEED)
    # The cache is keyed by requests alone, not by weights, so the default is an empty one per call.
    metrics, rows, asked = plan.scoring.score(model, progress, memory or Memory())
    metrics += average(plan.benchmark, metrics)
    engine = None if asked is None else asked.plain()
    return Evaluation(tuple(metrics), aligned(rows), engine)
