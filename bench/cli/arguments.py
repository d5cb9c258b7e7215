"""Arguments of commands: types whose errors say what is allowed, and the results folder."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from bench.errors import refuse_unclear_folder

RESULTS_DIR_FLAG = "--results-dir"


def results_dir_as_override(words: Sequence[str]) -> list[str]:
    """Replace `--results-dir FOLDER` in the arguments by the equivalent override."""
    found, rest = list[str](), iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name != RESULTS_DIR_FLAG:
            found.append(word)
            continue
        given = value if equals else next(rest, "")
        found.append(f"results_dir={given}")
    return found


def folder(text: str) -> Path:
    """Return a folder; unclear ones, such as an empty variable, are refused."""
    try:
        refuse_unclear_folder(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    return Path(text)


def non_negative_number(text: str) -> float:
    """Return a finite number of at least 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    # NaN and infinity are no valid tolerances.
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 0, such as 1e-4")
    return number


def non_negative_integer(text: str) -> int:
    """Return a whole number of at least 0."""
    # Larger numbers make no sense here, and would fail in libraries.
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, such as 0 or 40")
    return int(text)


def positive_integer(text: str) -> int:
    """Return a whole number of at least 1."""
    if not non_negative_integer(text):
        raise argparse.ArgumentTypeError("0 is too small: give 1 or more")
    return int(text)
