"""Silence lmms-eval: output for users goes through `bench.ui`."""

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
    """Suppress the logs, progress bars and prints of lmms-eval, and the bars of `datasets`."""
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logger.disable("")  # all names: task modules log under their own
    bar = lmms_eval.api.task.tqdm

    def hidden(*args: Any, **options: Any) -> Any:
        # One bar sets `disable` explicitly; ours must win, so functools.partial is not enough.
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
