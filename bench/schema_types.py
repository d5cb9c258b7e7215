"""Types of values in a config that refuse what does not fit in a sentence of their own.

A leaf that imports pydantic only, as the schema does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator


def _refuse_twice(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Raise if a value stands in a list twice, since its results would count twice."""
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice: name it once")
    return values


Distinct = AfterValidator(_refuse_twice)


def _expect(fits: Callable[[Any], bool], needed: str) -> BeforeValidator:
    """Refuse what does not fit by one sentence, where pydantic has one per type of a union."""

    def checked(value: Any) -> Any:
        if not fits(value):
            raise ValueError(needed)
        return value

    return BeforeValidator(checked)


def _is_whole(value: object, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _are_shots(value: object) -> bool:
    given = value.values() if isinstance(value, dict) else [value]
    return value is None or all(_is_whole(each, 0, MAX_SHOTS) for each in given)


MAX_SHOTS = 1000
Shots = Annotated[
    int | dict[str, int] | None,
    _expect(_are_shots, f"0 to {MAX_SHOTS} are needed, null, or a mapping from tasks to numbers"),
]
BatchSize = Annotated[
    int | Literal["auto"],
    _expect(lambda size: size == "auto" or _is_whole(size, 1), "1 or more is needed, or auto"),
]
Limit = Annotated[
    int | float | None,
    _expect(
        lambda limit: (
            limit is None or _is_whole(limit, 1) or (isinstance(limit, float) and 0 < limit < 1)
        ),
        "a number of documents from 1 on is needed, or a share between 0 and 1",
    ),
]
# Hydra replaces null by any mapping, and lets an empty one only be added to.
NullIsEmpty = BeforeValidator(lambda given: {} if given is None else given)
