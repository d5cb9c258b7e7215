"""Kinds of questions about a scene, each with a closed set of answers."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from bench.data.scenes.scene import (
    COLORS,
    COLUMNS,
    DIGITS,
    POPULAR,
    ROWS,
    SHAPES,
    SIZES,
    Digit,
    Scene,
    Shape,
)

Subject = tuple[str, ...]
Found = Mapping[Subject, str]
YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Question:
    """A question about a scene; `answers` are all answers that its kind can have."""

    kind: str
    subject: Subject
    text: str
    answer: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A question template, its possible subjects and answers, and how a scene answers it.

    `find` returns the answer for each subject that the scene can be asked about. A subject that is
    absent from the scene, or ambiguous in it, has no entry.
    """

    name: str
    template: str
    subjects: tuple[Subject, ...]
    answers: tuple[str, ...]
    find: Callable[[Scene], Found]

    def text(self, subject: Subject) -> str:
        """Return the text of the question about `subject`."""
        return self.template.format(*subject)

    def ask(self, scene: Scene) -> Iterator[Question]:
        """Yield all questions of this kind that the scene answers."""
        for subject, answer in self.find(scene).items():
            yield Question(self.name, subject, self.text(subject), answer, self.answers)


def yes_if(holds: bool) -> str:
    """Return "yes" or "no"."""
    return "yes" if holds else "no"


def _alone(scene: Scene) -> dict[str, tuple[int, int, Shape]]:
    # Shapes that occur once: "the circle" must refer to exactly one object.
    unique = scene.unique.items()
    return {k: (row, col, it) for k, (row, col, it) in unique if isinstance(it, Shape)}


def _color_of_shape(scene: Scene) -> Found:
    return {(shape,): thing.color for shape, (*_, thing) in _alone(scene).items()}


def _shape_of_color(scene: Scene) -> Found:
    counts = Counter(thing.color for thing in scene.shapes)
    return {(it.color,): it.shape for it in scene.shapes if counts[it.color] == 1}


def _size_of_shape(scene: Scene) -> Found:
    return {(shape,): thing.size for shape, (*_, thing) in _alone(scene).items()}


def _row_of_shape(scene: Scene) -> Found:
    return {(shape,): ROWS[row] for shape, (row, *_) in _alone(scene).items()}


def _column_of_shape(scene: Scene) -> Found:
    return {(shape,): COLUMNS[column] for shape, (_, column, _) in _alone(scene).items()}


def _pairs(scene: Scene, axis: Literal[0, 1]) -> dict[Subject, bool]:
    """Map each ordered pair of unique things to whether the first has the lower coordinate."""
    places = {name: (row, column)[axis] for name, (row, column, _) in scene.unique.items()}
    # Things in the same row (or column) are neither above nor below (left nor right).
    different = [(a, b) for a, b in permutations(places, 2) if places[a] != places[b]]
    return {(a, b): places[a] < places[b] for a, b in different}


def _sideways(scene: Scene) -> Found:
    return {pair: "left" if first else "right" for pair, first in _pairs(scene, 1).items()}


def _upright(scene: Scene) -> Found:
    return {pair: "above" if first else "below" for pair, first in _pairs(scene, 0).items()}


def _present(scene: Scene) -> Found:
    there = {(thing.color, thing.shape) for thing in scene.shapes}
    return {pair: yes_if(pair in there) for pair in _COMBINATIONS}


def _popular(scene: Scene) -> Found:
    return {pair: answer for pair, answer in _present(scene).items() if pair in POPULAR}


def _adversarial(scene: Scene) -> Found:
    # As POPE's adversarial negatives co-occur with what is in the image: an absent object is asked
    # for only if its colour and its shape are both there, on different objects.
    colors = {thing.color for thing in scene.shapes}
    shapes = {thing.shape for thing in scene.shapes}
    asked = _present(scene).items()
    return {pair: answer for pair, answer in asked if pair[0] in colors and pair[1] in shapes}


def _count(scene: Scene, names: tuple[str, ...]) -> Found:
    # A scene has up to five objects, but counts above 3 are too rare to be balanced: such a subject
    # has no question in that scene.
    counts = Counter(name for thing in scene.shapes for name in (thing.shape, thing.color))
    return {(name,): str(counts[name]) for name in names if str(counts[name]) in COUNTS}


def _exactly(scene: Scene) -> Found:
    counts = Counter(thing.shape for thing in scene.shapes)
    return {(n, shape): yes_if(counts[shape] == int(n)) for n, shape in _AMOUNTS}


def _left_or_above(scene: Scene) -> Found:
    found: dict[Subject, str] = {}
    for way, pairs in (("to the left of", _pairs(scene, 1)), ("above", _pairs(scene, 0))):
        found |= {(a, way, b): yes_if(first) for (a, b), first in pairs.items()}
    return found


def _is_color(scene: Scene) -> Found:
    alone = _alone(scene).items()
    return {(s, color): yes_if(it.color == color) for s, (*_, it) in alone for color in COLORS}


def _only_number(scene: Scene) -> str | None:
    return scene.digits[0].value if len(scene.digits) == 1 else None


def _number(scene: Scene) -> Found:
    value = _only_number(scene)
    return {(): value} if value else {}


def _number_at(scene: Scene) -> Found:
    # With exactly two digits a side names one of them, if they differ along its axis.
    placed = [(row, column, it.value) for row, column, it in scene.placed if isinstance(it, Digit)]
    if len(placed) != 2:
        return {}
    found: dict[Subject, str] = {}
    for axis, sides in enumerate((("top", "bottom"), ("left", "right"))):
        low, high = sorted(placed, key=operator.itemgetter(axis))
        if low[axis] != high[axis]:
            found |= {(sides[0],): low[2], (sides[1],): high[2]}
    return found


def _parity(scene: Scene) -> Found:
    value = _only_number(scene)
    return {("number",): "odd" if int(value) % 2 else "even"} if value else {}


def _is_parity(scene: Scene) -> Found:
    found = _parity(scene).values()
    return {(name,): yes_if(name == parity) for parity in found for name in ("odd", "even")}


def _is_number(scene: Scene) -> Found:
    value = _only_number(scene)
    return {(digit,): yes_if(digit == value) for digit in DIGITS} if value else {}


COUNTS = ("0", "1", "2", "3")
_SHAPE = tuple((shape,) for shape in SHAPES)
_COLOR = tuple((color,) for color in COLORS)
_COMBINATIONS = tuple((color, shape) for color in COLORS for shape in SHAPES)
# Without 0: "exactly 0 of the objects" is no natural question.
_AMOUNTS = tuple((n, shape) for n in COUNTS[1:] for shape in SHAPES)
_REFERENTS = tuple(permutations((*SHAPES, "number"), 2))
_RELATIONS = tuple((a, way, b) for way in ("to the left of", "above") for a, b in _REFERENTS)
_SIDES = tuple((side,) for side in ("top", "bottom", "left", "right"))
_THERE = "Is there a {} {} in the image?"

KINDS = {
    kind.name: kind
    for kind in (
        Kind("color", "What color is the {}?", _SHAPE, COLORS, _color_of_shape),
        Kind("shape", "What shape is the {} object?", _COLOR, SHAPES, _shape_of_color),
        Kind("size", "Is the {} small or large?", _SHAPE, SIZES, _size_of_shape),
        Kind("row", "Is the {} at the top, middle or bottom?", _SHAPE, ROWS, _row_of_shape),
        Kind(
            "column", "Is the {} at the left, center or right?", _SHAPE, COLUMNS, _column_of_shape
        ),
        Kind(
            "sideways",
            "Is the {} to the left or right of the {}?",
            _REFERENTS,
            ("left", "right"),
            _sideways,
        ),
        Kind(
            "upright", "Is the {} above or below the {}?", _REFERENTS, ("above", "below"), _upright
        ),
        Kind("random", _THERE, _COMBINATIONS, YES_NO, _present),
        Kind("popular", _THERE, POPULAR, YES_NO, _popular),
        Kind("adversarial", _THERE, _COMBINATIONS, YES_NO, _adversarial),
        Kind(
            "count_shape",
            "How many objects are a {}?",
            _SHAPE,
            COUNTS,
            lambda scene: _count(scene, SHAPES),
        ),
        Kind(
            "count_color",
            "How many objects are {}?",
            _COLOR,
            COUNTS,
            lambda scene: _count(scene, COLORS),
        ),
        Kind("number", "What number is written in the image?", ((),), DIGITS, _number),
        Kind("number_at", "What is the number at the {}?", _SIDES, DIGITS, _number_at),
        Kind("parity", "Is the {} odd or even?", (("number",),), ("odd", "even"), _parity),
        Kind("is_there", "Is there a {} {} in this image?", _COMBINATIONS, YES_NO, _present),
        Kind(
            "is_count",
            "Are exactly {} of the objects in this image a {}?",
            _AMOUNTS,
            YES_NO,
            _exactly,
        ),
        Kind("is_placed", "Is the {} {} the {} in this image?", _RELATIONS, YES_NO, _left_or_above),
        Kind(
            "is_color",
            "Is the {} in this image {}?",
            tuple((shape, color) for shape in SHAPES for color in COLORS),
            YES_NO,
            _is_color,
        ),
        Kind(
            "is_number",
            "Is the number in this image {}?",
            tuple((d,) for d in DIGITS),
            YES_NO,
            _is_number,
        ),
        Kind(
            "is_parity",
            "Is the number in this image {}?",
            (("odd",), ("even",)),
            YES_NO,
            _is_parity,
        ),
    )
}
