"""Which documents a limit leaves: the first ones, and with them what is only scored together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets

Rule = tuple[tuple[str, ...], Callable[..., Any]]

TOGETHER: dict[str, Rule] = {
    # Two questions about an image, of which both must be right for the second half of the score.
    "mme": (("category", "question_id"), lambda category, question: (category, question)),
    # A question and its copies with the options moved on, whose numbers are a million apart.
    "mmbench": (("index",), lambda index: index % 1_000_000),
}


def select(name: str, rows: datasets.Dataset, limit: int | None) -> list[int]:
    """Return the places of the documents to score, in order.

    Documents that belong together are all in or all out, so a limit may be exceeded by a few.
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
    """Return the name of what a document is scored together with, None where it stands alone."""
    rule = _rule(name)
    if rule is None:
        return None
    columns, key = rule
    return str(key(*(document[column] for column in columns)))


def _rule(name: str) -> Rule | None:
    """Return the columns that say what belongs together in a task, and how."""
    families = (key for key in TOGETHER if name == key or name.startswith(f"{key}_"))
    family = next(families, None)
    return None if family is None else TOGETHER[family]
