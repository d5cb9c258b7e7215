"""Suppression of the harnesses' own logs, prints and progress bars.

Progress is shown by `bench.ui`; a second bar on the same terminal would break it.
"""

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
    harness_log = logging.getLogger("lm_eval")
    level, verbosity = harness_log.level, datasets.utils.logging.get_verbosity()
    bars = datasets.utils.logging.is_progress_bar_enabled()
    harness_log.setLevel(logging.ERROR)
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    bar = lm_eval.api.task.tqdm
    # This bar has no switch, neither an argument nor a setting, so the name is patched.
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        harness_log.setLevel(level)
        datasets.utils.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def quiet_lmms_eval() -> Iterator[None]:
    """Suppress the logs, progress bars and prints of lmms-eval, and the bars of `datasets`."""
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    # All names, because task modules log under their own.
    logger.disable("")
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
