"""Documents left by a limit: the first ones, and those that are only scored together with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets

Rule = tuple[tuple[str, ...], Callable[..., Any]]

TOGETHER: dict[str, Rule] = {
    # Two questions about an image; the second half of the score counts images with both correct.
    "mme": (("category", "question_id"), lambda category, question: (category, question)),
    # A question and its copies with rotated options, whose indices are a million apart.
    "mmbench": (("index",), lambda index: index % 1_000_000),
}


def select(name: str, rows: datasets.Dataset, limit: int | None) -> list[int]:
    """Return the indices of the documents to score, in order.

    Documents that are scored together are all in or all out, so a limit may be exceeded by a few.
    """
    if limit is None or limit >= len(rows):
        return list(range(len(rows)))
    rule = _rule(name)
    if rule is None:
        return list(range(limit))
    columns, key = rule
    keys = [key(*values) for values in zip(*(rows[column] for column in columns), strict=True)]
    wanted = set(keys[:limit])
    return [place for place, each in enumerate(keys) if each in wanted]


def together(name: str, document: dict[str, Any]) -> str | None:
    """Return the name of the unit a document is scored in, or None if it is scored alone."""
    rule = _rule(name)
    if rule is None:
        return None
    columns, key = rule
    return str(key(*(document[column] for column in columns)))


def _rule(name: str) -> Rule | None:
    """Return the columns and the function that define the units of a task, if it has any."""
    families = (key for key in TOGETHER if name == key or name.startswith(f"{key}_"))
    family = next(families, None)
    return None if family is None else TOGETHER[family]
