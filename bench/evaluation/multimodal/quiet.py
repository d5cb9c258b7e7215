"""Keeping the harness quiet: what a user needs to see goes through `bench.progress`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import datasets
import lmms_eval.api.task
import lmms_eval.evaluator
from loguru import logger


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the harness's logs, bars and prints, and those of `datasets`."""
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logger.disable("")  # the harness's task modules log under names of their own
    bar = lmms_eval.api.task.tqdm

    def hidden(*args: Any, **options: Any) -> Any:
        # One of the harness's bars is asked for with a setting of its own, which is not to win.
        return bar(*args, **{**options, "disable": True})

    for module in (lmms_eval.api.task, lmms_eval.evaluator):
        module.tqdm = hidden
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        for module in (lmms_eval.api.task, lmms_eval.evaluator):
            module.tqdm = bar
        logger.enable("")
        if bars:
            datasets.enable_progress_bars()
