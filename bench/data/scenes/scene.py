"""A scene: a 3 x 3 grid of cells, each empty or with a coloured shape or a handwritten digit.

A scene is a pure function of its split and its index. The two splits use different seeds and
different digit images: as in `bench.data.images.digits`, training scenes use the first 1,200 of
scikit-learn's handwritten digits, test scenes the remaining 597.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]

GRID = 3
SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple")
SIZES = ("small", "large")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
DIGITS = tuple("0123456789")
TRAIN_DIGITS = 1200

# Some objects are more frequent than others, as in photographs: POPE's popular negatives are
# objects that are common in the data set but absent from the image.
POPULAR = (
    ("red", "circle"),
    ("blue", "square"),
    ("green", "triangle"),
    ("yellow", "cross"),
    ("purple", "circle"),
    ("red", "square"),
)
_POPULARITY = 2.0
# In themed scenes most objects share a colour or a shape, so that the higher counts that the
# counting questions need are common enough to be found.
_THEMED = 0.35
_THEME_STRENGTH = 0.65


@dataclass(frozen=True)
class Shape:
    """A drawn object."""

    size: str
    color: str
    shape: str

    @property
    def name(self) -> str:
        """The name used in descriptions."""
        return f"{self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Digit:
    """A handwritten digit: its value, and its index among scikit-learn's images."""

    value: str
    sample: int

    @property
    def name(self) -> str:
        """The name used in descriptions."""
        return f"number {self.value}"


Thing = Shape | Digit


@dataclass(frozen=True)
class Scene:
    """Nine cells in reading order, generated from `split` and `index`."""

    split: Split
    index: int
    cells: tuple[Thing | None, ...]

    @property
    def placed(self) -> list[tuple[int, int, Thing]]:
        """Row, column and content of each non-empty cell, in reading order."""
        return [(*divmod(i, GRID), thing) for i, thing in enumerate(self.cells) if thing]

    @property
    def shapes(self) -> list[Shape]:
        """The drawn objects in reading order."""
        return [thing for thing in self.cells if isinstance(thing, Shape)]

    @property
    def digits(self) -> list[Digit]:
        """The digits in reading order."""
        return [thing for thing in self.cells if isinstance(thing, Digit)]

    @functools.cached_property
    def unique(self) -> dict[str, tuple[int, int, Thing]]:
        """Row, column and content of each thing that is alone of its kind in the scene.

        The key is the shape of an object, or `number` for a digit.
        """
        kinds = [thing.shape if isinstance(thing, Shape) else "number" for *_, thing in self.placed]
        counts = Counter(kinds)
        found = zip(kinds, self.placed, strict=True)
        return {kind: placed for kind, placed in found if counts[kind] == 1}


@functools.cache
def _values() -> tuple[str, ...]:
    from sklearn.datasets import load_digits

    return tuple(str(value) for value in load_digits().target)


def scene(split: Split, index: int) -> Scene:
    """Generate the scene of a split at an index."""
    # The order of draws is part of the data: an inserted draw changes every scene and with it the
    # fingerprints of the tasks, and the stored weights no longer fit.
    rng = random.Random(f"scene {split} {index}")
    theme = rng.choice((*SHAPES, *COLORS)) if rng.random() < _THEMED else None
    things: list[Thing] = [_shape(rng, theme) for _ in range(rng.randint(2, 5))]
    things += [_digit(rng, split) for _ in range(rng.choice((0, 1, 1, 1, 2)))]
    cells: list[Thing | None] = [None] * GRID**2
    for cell, thing in zip(rng.sample(range(GRID**2), len(things)), things, strict=True):
        cells[cell] = thing
    return Scene(split, index, tuple(cells))


def _shape(rng: random.Random, theme: str | None) -> Shape:
    """Draw an object, with preference for popular ones and for the theme of the scene."""
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    if theme and rng.random() < _THEME_STRENGTH:
        pairs = [pair for pair in pairs if theme in pair]
    weights = [_POPULARITY if pair in POPULAR else 1.0 for pair in pairs]
    color, shape = rng.choices(pairs, weights)[0]
    return Shape(rng.choice(SIZES), color, shape)


def _digit(rng: random.Random, split: Split) -> Digit:
    values = _values()
    train = split == "train"
    sample = rng.randrange(TRAIN_DIGITS) if train else rng.randrange(TRAIN_DIGITS, len(values))
    return Digit(values[sample], sample)
