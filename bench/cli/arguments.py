"""Arguments of commands: options among overrides, and types whose errors say what is allowed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from bench.errors import UserError, refuse_unclear_folder

RESULTS_DIR_FLAG = "--results-dir"


def results_dir_as_override(words: Sequence[str]) -> list[str]:
    """Replace `--results-dir FOLDER` in the arguments by the equivalent override, at the end.

    Raises:
        UserError: the option is given twice.
    """
    given, rest = split_option(words, RESULTS_DIR_FLAG)
    return rest if given is None else [*rest, f"results_dir={given}"]


def split_option(arguments: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Return the value of `NAME VALUE` or `NAME=VALUE`, None without it, and the other arguments.

    Raises:
        UserError: the option is given twice.
    """
    places = [place for place, word in enumerate(arguments) if word.partition("=")[0] == name]
    if not places:
        return None, list(arguments)
    if len(places) > 1:
        raise UserError(f"{name} is given twice: give it once")
    (place,) = places
    _, equals, given = arguments[place].partition("=")
    end = place + (1 if equals else 2)
    value = given if equals else " ".join(arguments[place + 1 : end])
    return value, [*arguments[:place], *arguments[end:]]


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
