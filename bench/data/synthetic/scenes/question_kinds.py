"""Kinds of questions about a scene, each with a closed set of answers."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from bench.data.synthetic.scenes.scene import (
    COLORS,
    COLUMNS,
    DIGITS,
    POPULAR,
    ROWS,
    SHAPES,
    SIZES,
    DrawnDigit,
    DrawnShape,
    Scene,
)

Subject = tuple[str, ...]
SubjectAnswers = Mapping[Subject, str]
YES_NO = ("yes", "no")


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a scene; `answers` are all answers that its kind can have."""

    kind: str
    subject: Subject
    text: str
    answer: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class QuestionKind:
    """A question template, its possible subjects and answers, and how a scene answers it.

    `find` returns the answer for each subject that the scene can be asked about. A subject that is
    absent from the scene, or ambiguous in it, has no entry.
    """

    name: str
    template: str
    subjects: tuple[Subject, ...]
    answers: tuple[str, ...]
    find: Callable[[Scene], SubjectAnswers]

    def text(self, subject: Subject) -> str:
        """Return the text of the question about `subject`."""
        return self.template.format(*subject)

    def ask(self, scene: Scene) -> Iterator[SceneQuestion]:
        """Yield all questions of this kind that the scene answers."""
        for subject, answer in self.find(scene).items():
            yield SceneQuestion(self.name, subject, self.text(subject), answer, self.answers)


def yes_or_no(holds: bool) -> str:
    """Return "yes" or "no"."""
    return "yes" if holds else "no"


def _unique_shapes(scene: Scene) -> dict[str, tuple[int, int, DrawnShape]]:
    # Shapes that occur once: "the circle" must refer to exactly one object.
    unique = scene.unique.items()
    return {k: (row, col, it) for k, (row, col, it) in unique if isinstance(it, DrawnShape)}


def _color_of_shape(scene: Scene) -> SubjectAnswers:
    return {(shape,): thing.color for shape, (*_, thing) in _unique_shapes(scene).items()}


def _shape_of_color(scene: Scene) -> SubjectAnswers:
    counts = Counter(thing.color for thing in scene.shapes)
    return {(it.color,): it.shape for it in scene.shapes if counts[it.color] == 1}


def _size_of_shape(scene: Scene) -> SubjectAnswers:
    return {(shape,): thing.size for shape, (*_, thing) in _unique_shapes(scene).items()}


def _row_of_shape(scene: Scene) -> SubjectAnswers:
    return {(shape,): ROWS[row] for shape, (row, *_) in _unique_shapes(scene).items()}


def _column_of_shape(scene: Scene) -> SubjectAnswers:
    return {(shape,): COLUMNS[column] for shape, (_, column, _) in _unique_shapes(scene).items()}


def _ordered_pairs(scene: Scene, axis: Literal[0, 1]) -> dict[Subject, bool]:
    """Map each ordered pair of unique things to whether the first has the lower coordinate."""
    places = {name: (row, column)[axis] for name, (row, column, _) in scene.unique.items()}
    # Things in the same row (or column) are neither above nor below (left nor right).
    different = [(a, b) for a, b in permutations(places, 2) if places[a] != places[b]]
    return {(a, b): places[a] < places[b] for a, b in different}


def _left_or_right(scene: Scene) -> SubjectAnswers:
    return {pair: "left" if first else "right" for pair, first in _ordered_pairs(scene, 1).items()}


def _above_or_below(scene: Scene) -> SubjectAnswers:
    return {pair: "above" if first else "below" for pair, first in _ordered_pairs(scene, 0).items()}


def _present(scene: Scene) -> SubjectAnswers:
    there = {(thing.color, thing.shape) for thing in scene.shapes}
    return {pair: yes_or_no(pair in there) for pair in _COLOR_SHAPE_SUBJECTS}


def _popular(scene: Scene) -> SubjectAnswers:
    return {pair: answer for pair, answer in _present(scene).items() if pair in POPULAR}


def _adversarial(scene: Scene) -> SubjectAnswers:
    # As POPE's adversarial negatives co-occur with what is in the image: an absent object is asked
    # for only if its colour and its shape are both there, on different objects.
    colors = {thing.color for thing in scene.shapes}
    shapes = {thing.shape for thing in scene.shapes}
    answers = _present(scene).items()
    return {pair: answer for pair, answer in answers if pair[0] in colors and pair[1] in shapes}


def _count(scene: Scene, names: tuple[str, ...]) -> SubjectAnswers:
    # A scene has up to five objects, but counts above 3 are too rare to be balanced: such a subject
    # has no question in that scene.
    counts = Counter(name for thing in scene.shapes for name in (thing.shape, thing.color))
    return {(name,): str(counts[name]) for name in names if str(counts[name]) in COUNTS}


def _is_count(scene: Scene) -> SubjectAnswers:
    counts = Counter(thing.shape for thing in scene.shapes)
    return {(n, shape): yes_or_no(counts[shape] == int(n)) for n, shape in _COUNT_SHAPE_SUBJECTS}


def _is_placed(scene: Scene) -> SubjectAnswers:
    found: dict[Subject, str] = {}
    for way, pairs in (
        ("to the left of", _ordered_pairs(scene, 1)),
        ("above", _ordered_pairs(scene, 0)),
    ):
        found |= {(a, way, b): yes_or_no(first) for (a, b), first in pairs.items()}
    return found


def _is_color(scene: Scene) -> SubjectAnswers:
    alone = _unique_shapes(scene).items()
    return {(s, color): yes_or_no(it.color == color) for s, (*_, it) in alone for color in COLORS}


def _only_number(scene: Scene) -> str | None:
    return scene.digits[0].value if len(scene.digits) == 1 else None


def _number(scene: Scene) -> SubjectAnswers:
    value = _only_number(scene)
    return {(): value} if value else {}


def _number_at(scene: Scene) -> SubjectAnswers:
    # With exactly two digits a side names one of them, if they differ along its axis.
    placed = [
        (row, column, it.value) for row, column, it in scene.placed if isinstance(it, DrawnDigit)
    ]
    if len(placed) != 2:
        return {}
    found: dict[Subject, str] = {}
    for axis, sides in enumerate((("top", "bottom"), ("left", "right"))):
        low, high = sorted(placed, key=operator.itemgetter(axis))
        if low[axis] != high[axis]:
            found |= {(sides[0],): low[2], (sides[1],): high[2]}
    return found


def _parity(scene: Scene) -> SubjectAnswers:
    value = _only_number(scene)
    return {("number",): "odd" if int(value) % 2 else "even"} if value else {}


def _is_parity(scene: Scene) -> SubjectAnswers:
    found = _parity(scene).values()
    return {(name,): yes_or_no(name == parity) for parity in found for name in ("odd", "even")}


def _is_number(scene: Scene) -> SubjectAnswers:
    value = _only_number(scene)
    return {(digit,): yes_or_no(digit == value) for digit in DIGITS} if value else {}


COUNTS = ("0", "1", "2", "3")
_SHAPE_SUBJECTS = tuple((shape,) for shape in SHAPES)
_COLOR_SUBJECTS = tuple((color,) for color in COLORS)
_COLOR_SHAPE_SUBJECTS = tuple((color, shape) for color in COLORS for shape in SHAPES)

# Without 0: "exactly 0 of the objects" is no natural question.
_COUNT_SHAPE_SUBJECTS = tuple((n, shape) for n in COUNTS[1:] for shape in SHAPES)
_PAIR_SUBJECTS = tuple(permutations((*SHAPES, "number"), 2))
_RELATION_SUBJECTS = tuple(
    (a, way, b) for way in ("to the left of", "above") for a, b in _PAIR_SUBJECTS
)
_SIDE_SUBJECTS = tuple((side,) for side in ("top", "bottom", "left", "right"))
_PRESENCE_TEMPLATE = "Is there a {} {} in the image?"
KINDS = {
    kind.name: kind
    for kind in (
        QuestionKind("color", "What color is the {}?", _SHAPE_SUBJECTS, COLORS, _color_of_shape),
        QuestionKind(
            "shape", "What shape is the {} object?", _COLOR_SUBJECTS, SHAPES, _shape_of_color
        ),
        QuestionKind("size", "Is the {} small or large?", _SHAPE_SUBJECTS, SIZES, _size_of_shape),
        QuestionKind(
            "row", "Is the {} at the top, middle or bottom?", _SHAPE_SUBJECTS, ROWS, _row_of_shape
        ),
        QuestionKind(
            "column",
            "Is the {} at the left, center or right?",
            _SHAPE_SUBJECTS,
            COLUMNS,
            _column_of_shape,
        ),
        QuestionKind(
            "sideways",
            "Is the {} to the left or right of the {}?",
            _PAIR_SUBJECTS,
            ("left", "right"),
            _left_or_right,
        ),
        QuestionKind(
            "upright",
            "Is the {} above or below the {}?",
            _PAIR_SUBJECTS,
            ("above", "below"),
            _above_or_below,
        ),
        QuestionKind("random", _PRESENCE_TEMPLATE, _COLOR_SHAPE_SUBJECTS, YES_NO, _present),
        QuestionKind("popular", _PRESENCE_TEMPLATE, POPULAR, YES_NO, _popular),
        QuestionKind(
            "adversarial", _PRESENCE_TEMPLATE, _COLOR_SHAPE_SUBJECTS, YES_NO, _adversarial
        ),
        QuestionKind(
            "count_shape",
            "How many objects are a {}?",
            _SHAPE_SUBJECTS,
            COUNTS,
            lambda scene: _count(scene, SHAPES),
        ),
        QuestionKind(
            "count_color",
            "How many objects are {}?",
            _COLOR_SUBJECTS,
            COUNTS,
            lambda scene: _count(scene, COLORS),
        ),
        QuestionKind("number", "What number is written in the image?", ((),), DIGITS, _number),
        QuestionKind(
            "number_at", "What is the number at the {}?", _SIDE_SUBJECTS, DIGITS, _number_at
        ),
        QuestionKind("parity", "Is the {} odd or even?", (("number",),), ("odd", "even"), _parity),
        QuestionKind(
            "is_there", "Is there a {} {} in this image?", _COLOR_SHAPE_SUBJECTS, YES_NO, _present
        ),
        QuestionKind(
            "is_count",
            "Are exactly {} of the objects in this image a {}?",
            _COUNT_SHAPE_SUBJECTS,
            YES_NO,
            _is_count,
        ),
        QuestionKind(
            "is_placed",
            "Is the {} {} the {} in this image?",
            _RELATION_SUBJECTS,
            YES_NO,
            _is_placed,
        ),
        QuestionKind(
            "is_color",
            "Is the {} in this image {}?",
            tuple((shape, color) for shape in SHAPES for color in COLORS),
            YES_NO,
            _is_color,
        ),
        QuestionKind(
            "is_number",
            "Is the number in this image {}?",
            tuple((d,) for d in DIGITS),
            YES_NO,
            _is_number,
        ),
        QuestionKind(
            "is_parity",
            "Is the number in this image {}?",
            (("odd",), ("even",)),
            YES_NO,
            _is_parity,
        ),
    )
}
