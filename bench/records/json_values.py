"""Parse untrusted JSON into values that can be stored and read by every part of the program."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from pydantic_core import from_json

MAX_DEPTH = 64
MAX_INTEGER = 2**63 - 1
"""Whole numbers are stored in 64 bits by Parquet, JavaScript and most other readers."""
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_NO_STRUCTURE = bytes(set(range(256)) - set(b'[]{}"\\'))
_ALL_DIGITS_ZERO = bytes.maketrans(b"123456789E", b"000000000e")
_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_MAY_OVERFLOW = re.compile(rb"\d{19}|[eE]\+?\d{3}")
"""Matches numbers that may not fit, by their length or exponent; all others do."""
_LARGE_EXPONENT = re.compile(rb"0e0000*(?:[\s,\]}]|\Z)")
"""Of a number whose digits are zeros; in a hash, another letter or a quote follows."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(content: bytes) -> object:
    """Parse JSON whose values can be stored and read by every part of the program.

    Raises:
        ValueError: it is not JSON, is nested deeper than `MAX_DEPTH`, or has a number or string
            that cannot be stored.
    """
    # Takes a third of the time of Python's own parser, which is used for error messages.
    try:
        found: object = from_json(content, allow_inf_nan=False)
    except ValueError:
        return _parse_json_slowly(content)
    if is_surely_storable(content) or _is_storable(found):
        return found
    return _parse_json_slowly(content)


def is_surely_storable(content: bytes) -> bool:
    """Return whether the values of JSON are certainly storable, judged by its text alone."""
    # Takes a fifth of the time of a walk over the values, and is true of nearly every file.
    numbers = content.translate(_ALL_DIGITS_ZERO, b"+")
    if b"0" * 19 in numbers or b"NaN" in content or b"Infinity" in content:
        return False
    if _LARGE_EXPONENT.search(numbers):
        return False
    marks = content.translate(None, _NO_STRUCTURE)
    if b"\\" in marks:
        return False
    # Adjacent quotes enclose no bracket. If all quotes are adjacent pairs, every bracket is
    # structure.
    marks = marks.replace(b'""', b"")
    return b'"' not in marks and _is_shallow(marks)


def _is_storable(parsed: object) -> bool:
    """Return whether values are nested at most `MAX_DEPTH` deep and all numbers fit."""
    level: list[Any] = [[parsed]]
    # One more level for the list around the whole.
    for _ in range(MAX_DEPTH + 1):
        below = []
        for values in level:
            for value in values:
                kind = type(value)
                if kind is str:
                    continue
                if kind is dict:
                    below.append(value.values())
                elif kind is list:
                    below.append(value)
                elif kind is int:
                    if not -MAX_INTEGER <= value <= MAX_INTEGER:
                        return False
                elif kind is float and not math.isfinite(value):
                    return False
        if not below:
            return True
        level = below
    return False


def _parse_json_slowly(content: bytes) -> object:
    """Parse JSON like `parse_json`, with a message about what is wrong with it."""
    without_texts = _TEXT.sub(b"", content)
    if not _is_shallow(without_texts):
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    # Numbers are checked only if necessary, because a call per number adds half of the time.
    checked = _MAY_OVERFLOW.search(without_texts) is not None
    try:
        found = json.loads(
            content.decode(),
            parse_constant=_refuse_constant,
            parse_float=_finite if checked else None,
            parse_int=_bounded if checked else None,
        )
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    if _SURROGATE.search(content):
        # A lone surrogate is valid in JSON, but cannot be encoded.
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it contains half a character") from None
    return found


def _is_shallow(without_texts: bytes) -> bool:
    """Return whether brackets are nested at most `MAX_DEPTH` deep, without parsing."""
    # With functions in C: keep only brackets, then remove pairs from the inside.
    left = without_texts.translate(None, _NO_BRACKETS)
    for _ in range(MAX_DEPTH):
        if not left:
            return True
        left = left.replace(b"{}", b"").replace(b"[]", b"")
    if b"{}" in left or b"[]" in left:
        return False
    # Unbalanced brackets are not JSON, which the parser reports.
    return left.count(b"[") + left.count(b"{") <= MAX_DEPTH


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it contains {name}, which is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it contains {text[:20]}, which is not a finite number")
    return value


def _bounded(text: str) -> int:
    # The length is tested first, because Python refuses to convert thousands of digits.
    if len(text) > 20 or abs(int(text)) > MAX_INTEGER:
        raise ValueError(f"it contains {text[:20]}..., which needs more than 64 bits")
    return int(text)
