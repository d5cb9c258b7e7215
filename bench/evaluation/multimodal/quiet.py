"""Keeping the harness quiet: what a user needs to see goes through `bench.progress`."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

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
    for module in (lmms_eval.api.task, lmms_eval.evaluator):
        module.tqdm = functools.partial(bar, disable=True)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        for module in (lmms_eval.api.task, lmms_eval.evaluator):
            module.tqdm = bar
        logger.enable("")
        if bars:
            datasets.enable_progress_bars()
