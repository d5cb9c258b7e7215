"""What scoring costs besides the network's forward, for each request, against lm-eval's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch

from bench.evaluation.task_planning import quiet_lm_eval
from bench.evaluation.text.adapter import LmEvalAdapter
from bench.evaluation.text.lm_eval import cached_templates
from bench.models import loading, source
from bench.models.model import Model
from bench.schema import ModelConfig
from bench.ui import SILENT
from tests.performance import timed_tasks
from tests.performance.figure import Figure
from tests.performance.text_scoring import reference

DOCUMENTS, ROUNDS, BATCH = 100, 3, 16


def figures() -> list[Figure]:
    """Milliseconds a request outside the forward, ours over theirs, over the embedded tasks."""
    torch.set_num_threads(1)
    config = ModelConfig(
        name="micro_moe", source="embedded:micro_moe", device="cpu", dtype="float32"
    )
    model = loading.load_model(source.resolve_model(config, offline=True))
    least = {name: _least(model, timed_tasks.task(name)) for name in timed_tasks.names()}
    ours, theirs = (sum(pair[i] for pair in least.values()) / len(least) for i in (0, 1))
    each = ", ".join(f"{name} {mine / its:.2f}" for name, (mine, its) in least.items())
    how = (
        f"mean of {len(least)} tasks, minima of {ROUNDS}: {1e3 * theirs:.2f} ms a request with hf, "
        f"{1e3 * ours:.2f} ms with ours; {each}; harness included"
    )
    value = ours / theirs
    return [Figure("time outside the forward / lm-eval's", value, "<= 0.33", value <= 1 / 3, how)]


def _least(model: Model, planned: Any) -> tuple[float, float]:
    """Return the least seconds a request outside the network, ours and lm-eval's, in turn."""
    ours, theirs = [], []
    for _ in range(ROUNDS):
        theirs.append(_outside(model, planned, lambda: reference(model, BATCH)))
        ours.append(
            _outside(model, planned, lambda: LmEvalAdapter(model, BATCH, SILENT, "prefix_sharing"))
        )
    return min(ours), min(theirs)


def _outside(model: Model, planned: Any, make: Callable[[], Any]) -> float:
    """Return the seconds a request that a whole evaluation spends outside the network."""
    from lm_eval.evaluator import evaluate as harness

    inside, stock = [], model.network.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return stock(*args, **kwargs)
        finally:
            inside.append(time.perf_counter() - began)

    timed.__signature__ = __import__("inspect").signature(stock)  # type: ignore[attr-defined]
    model.network.forward = timed  # type: ignore[method-assign]
    began = time.perf_counter()
    try:
        with quiet_lm_eval(), redirect_stderr(StringIO()):
            lm = make()
            context = cached_templates() if isinstance(lm, LmEvalAdapter) else quiet_lm_eval()
            with context:
                result = harness(lm, {"tasks": planned.tasks}, limit=DOCUMENTS, bootstrap_iters=0)
    finally:
        model.network.forward = stock  # type: ignore[method-assign]
    whole = time.perf_counter() - began
    count = sum(len(sample["resps"]) for sample in result["samples"][planned.name])
    return (whole - sum(inside)) / count
