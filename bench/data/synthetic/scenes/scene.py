"""A scene, a 3 x 3 grid of cells with coloured shapes and handwritten digits, and its picture.

A scene is a pure function of its split and its index. The two splits use different seeds and
different digit images: training scenes use the first 1,200 of scikit-learn's handwritten digits,
test scenes the remaining 597.

A picture has 64 x 64 pixels; a patch of 8 x 8 is a quarter of a cell. All arithmetic is on
integers, so that a scene has the same pixels on every machine. Shapes: H height, W width, C colour
channels, S side of a cell.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench.data.handwritten_digits import MAX_LEVEL, TRAIN_IMAGES, handwritten_digits
from bench.data.synthetic import Split

GRID = 3
SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple")
SIZES = ("small", "large")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
DIGITS = tuple("0123456789")

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
_POPULAR_WEIGHT = 2.0

# In themed scenes most objects share a colour or a shape, so that the higher counts that the
# counting questions need are common enough to be found.
_THEMED_SHARE = 0.35
_THEME_STRENGTH = 0.65


@dataclass(frozen=True)
class DrawnShape:
    """A drawn object."""

    size: str
    color: str
    shape: str

    @property
    def name(self) -> str:
        """The name used in descriptions."""
        return f"{self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class DrawnDigit:
    """A handwritten digit: its value, and its index among scikit-learn's images."""

    value: str
    sample: int

    @property
    def name(self) -> str:
        """The name used in descriptions."""
        return f"number {self.value}"


Thing = DrawnShape | DrawnDigit


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
    def shapes(self) -> list[DrawnShape]:
        """The drawn objects in reading order."""
        return [thing for thing in self.cells if isinstance(thing, DrawnShape)]

    @property
    def digits(self) -> list[DrawnDigit]:
        """The digits in reading order."""
        return [thing for thing in self.cells if isinstance(thing, DrawnDigit)]

    @functools.cached_property
    def unique(self) -> dict[str, tuple[int, int, Thing]]:
        """Row, column and content of each thing that is alone of its kind in the scene.

        The key is the shape of an object, or `number` for a digit.
        """
        kinds = [
            thing.shape if isinstance(thing, DrawnShape) else "number" for *_, thing in self.placed
        ]
        counts = Counter(kinds)
        found = zip(kinds, self.placed, strict=True)
        return {kind: placed for kind, placed in found if counts[kind] == 1}


def generate_scene(split: Split, index: int) -> Scene:
    """Generate the scene of a split at an index."""
    # The order of draws is part of the data: an inserted draw changes every scene and with it the
    # fingerprints of the tasks, and the stored weights no longer fit.
    rng = random.Random(f"scene {split} {index}")
    theme = rng.choice((*SHAPES, *COLORS)) if rng.random() < _THEMED_SHARE else None
    things: list[Thing] = [_random_shape(rng, theme) for _ in range(rng.randint(2, 5))]
    things += [_random_digit(rng, split) for _ in range(rng.choice((0, 1, 1, 1, 2)))]
    cells: list[Thing | None] = [None] * GRID**2
    for cell, thing in zip(rng.sample(range(GRID**2), len(things)), things, strict=True):
        cells[cell] = thing
    return Scene(split, index, tuple(cells))


def _random_shape(rng: random.Random, theme: str | None) -> DrawnShape:
    """Draw an object, with preference for popular ones and for the theme of the scene."""
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    if theme and rng.random() < _THEME_STRENGTH:
        pairs = [pair for pair in pairs if theme in pair]
    weights = [_POPULAR_WEIGHT if pair in POPULAR else 1.0 for pair in pairs]
    color, shape = rng.choices(pairs, weights)[0]
    return DrawnShape(rng.choice(SIZES), color, shape)


def _random_digit(rng: random.Random, split: Split) -> DrawnDigit:
    labels = handwritten_digits().labels
    train = split == "train"
    sample = rng.randrange(TRAIN_IMAGES) if train else rng.randrange(TRAIN_IMAGES, len(labels))
    return DrawnDigit(str(labels[sample]), sample)


IMAGE_SIZE = 64
CELL_SIZE = 16
BORDER = (IMAGE_SIZE - GRID * CELL_SIZE) // 2
_RGB = {
    "red": (215, 50, 40),
    "green": (60, 175, 75),
    "blue": (60, 90, 220),
    "yellow": (235, 205, 60),
    "purple": (160, 60, 190),
}

# Half of an object's extent, in half pixels: the centre of a cell of 16 pixels lies between two
# pixels, and in half pixels it has integer coordinates.
_EXTENT = {"small": 8, "large": 13}
_INK_LEVEL = 235
_DIGIT_SHIFT = 2
_COLOR_JITTER = 15


def draw_scene(scene: Scene) -> Image.Image:
    """Draw the picture of a scene; the same scene always gives the same pixels."""
    # Noise, colour and position vary, so that a model cannot memorise pixels. The order of draws is
    # part of the data: it decides the fingerprints of the tasks.
    rng = random.Random(f"pixels {scene.split} {scene.index}")
    noise_HW = (
        np.frombuffer(rng.randbytes(IMAGE_SIZE * IMAGE_SIZE), np.uint8).reshape(
            IMAGE_SIZE, IMAGE_SIZE
        )
        % MAX_LEVEL
    )
    canvas_HWC = np.repeat((noise_HW + rng.randint(30, 60))[..., None], 3, axis=2).astype(np.int64)
    for row, column, thing in scene.placed:
        top, left = BORDER + row * CELL_SIZE, BORDER + column * CELL_SIZE
        if isinstance(thing, DrawnShape):
            mask_SS = _shape_mask(thing, rng.choice((-2, 0, 2)), rng.choice((-2, 0, 2)))
            color = [
                channel + rng.randint(-_COLOR_JITTER, _COLOR_JITTER)
                for channel in _RGB[thing.color]
            ]
            canvas_HWC[top : top + CELL_SIZE, left : left + CELL_SIZE][mask_SS] = color
        else:
            top, left = (
                top + rng.randint(-_DIGIT_SHIFT, _DIGIT_SHIFT),
                left + rng.randint(-_DIGIT_SHIFT, _DIGIT_SHIFT),
            )
            under_SSC = canvas_HWC[top : top + CELL_SIZE, left : left + CELL_SIZE]
            ink_SSC = _digit_ink(thing)[..., None]
            # Blend the ink over the background, in 16ths.
            under_SSC += (_INK_LEVEL - under_SSC) * ink_SSC // MAX_LEVEL
    return Image.fromarray(canvas_HWC.clip(0, 255).astype(np.uint8))


def _shape_mask(thing: DrawnShape, dx: int, dy: int) -> NDArray[np.bool_]:
    """Return the pixels of an object in its cell; offsets are in half pixels."""
    middle_S = 2 * np.arange(CELL_SIZE) + 1 - CELL_SIZE
    x_SS, y_SS = np.meshgrid(middle_S - dx, middle_S - dy)
    extent = _EXTENT[thing.size]
    far_SS = np.maximum(abs(x_SS), abs(y_SS))
    masks: dict[str, NDArray[np.bool_]] = {
        "circle": x_SS**2 + y_SS**2 <= extent**2,
        # 6/7 of the extent gives the square about the area of the circle.
        "square": far_SS <= extent * 6 // 7,
        "triangle": (2 * abs(x_SS) <= y_SS + extent) & (far_SS <= extent),
        "cross": (np.minimum(abs(x_SS), abs(y_SS)) <= extent // 4) & (far_SS <= extent),
    }
    return masks[thing.shape]


def _digit_ink(thing: DrawnDigit) -> NDArray[np.int64]:
    """Return the ink of a digit from 0 to 16, its 8 x 8 pixels enlarged to 16 x 16."""
    small_88 = handwritten_digits().images[thing.sample]
    return np.repeat(np.repeat(small_88, 2, axis=0), 2, axis=1)
