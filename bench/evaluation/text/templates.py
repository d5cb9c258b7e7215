"""Compiling prompt templates once: the harness compiles them anew for every document."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import lm_eval.utils


@contextmanager
def compiled_once() -> Iterator[None]:
    """Keep the harness's compiled templates while the block runs; what they render is the same."""
    environment = lm_eval.utils.env
    environment.from_string = functools.cache(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # uncovers the class's own method
