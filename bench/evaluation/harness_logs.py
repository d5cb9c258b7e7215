"""Silence for both harnesses: no logs, progress bars or prints of theirs in our terminal."""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import datasets
import lm_eval.api.task
import lmms_eval.evaluator
from loguru import logger


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Suppress the logs and progress bars of lm-eval and of `datasets`."""
    logger = logging.getLogger("lm_eval")
    level, verbosity = logger.level, datasets.utils.logging.get_verbosity()
    bars = datasets.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    bar = lm_eval.api.task.tqdm
    # This bar has no switch, neither an argument nor a setting, so the name is patched.
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        logger.setLevel(level)
        datasets.utils.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def quiet_lmms_eval() -> Iterator[None]:
    """Suppress the logs, progress bars and prints of lmms-eval, and the bars of `datasets`."""
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logger.disable("")  # all names: task modules log under their own
    bar = lmms_eval.api.task.tqdm

    def hidden_bar(*args: object, **options: object) -> object:
        # One bar sets `disable` explicitly; ours must win, so functools.partial is not enough.
        return bar(*args, **{**options, "disable": True})

    for module in (lmms_eval.api.task, lmms_eval.evaluator):
        module.tqdm = hidden_bar
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        for module in (lmms_eval.api.task, lmms_eval.evaluator):
            module.tqdm = bar
        logger.enable("")
        if bars:
            datasets.enable_progress_bars()
