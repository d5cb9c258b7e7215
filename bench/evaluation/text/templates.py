"""Prompt templates compiled once; lm-eval compiles them again for every document."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import lm_eval.utils


@contextmanager
def compiled_once() -> Iterator[None]:
    """Cache compiled templates while the block runs; prompts do not change."""
    environment = lm_eval.utils.env
    # Safe, because a compiled template holds no state of a document, and the environment is a
    # module global that lives as long as lm-eval.
    environment.from_string = functools.cache(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # the instance attribute; the method of the class is back
