"""Silence lm-eval: output for users goes through `bench.ui`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import lm_eval.api.task


@contextmanager
def quiet() -> Iterator[None]:
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
