"""Pictures of scenes: 64 x 64 pixels, where a patch of 8 x 8 pixels is a quarter of a cell.

Shapes: H height, W width, C colour channels, S side of a cell. All arithmetic is on integers, so
that a scene has the same pixels on every machine.
"""

from __future__ import annotations

import functools
import random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench.data.scenes.scene import GRID, Digit, Scene, Shape

SIZE = 64
CELL = 16
BORDER = (SIZE - GRID * CELL) // 2

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
_INK = 235
_LEVELS = 16
_SHIFT = 2
_SHADE = 15


def render(scene: Scene) -> Image.Image:
    """Draw the picture of a scene; the same scene always gives the same pixels."""
    # Noise, colour and position vary, so that a model cannot memorise pixels. The order of draws is
    # part of the data: it decides the fingerprints of the tasks.
    rng = random.Random(f"pixels {scene.split} {scene.index}")
    noise_HW = np.frombuffer(rng.randbytes(SIZE * SIZE), np.uint8).reshape(SIZE, SIZE) % _LEVELS
    canvas_HWC = np.repeat((noise_HW + rng.randint(30, 60))[..., None], 3, axis=2).astype(np.int64)
    for row, column, thing in scene.placed:
        top, left = BORDER + row * CELL, BORDER + column * CELL
        if isinstance(thing, Shape):
            mask_SS = _mask(thing, rng.choice((-2, 0, 2)), rng.choice((-2, 0, 2)))
            color = [channel + rng.randint(-_SHADE, _SHADE) for channel in _RGB[thing.color]]
            canvas_HWC[top : top + CELL, left : left + CELL][mask_SS] = color
        else:
            top, left = top + rng.randint(-_SHIFT, _SHIFT), left + rng.randint(-_SHIFT, _SHIFT)
            under_SSC = canvas_HWC[top : top + CELL, left : left + CELL]
            ink_SSC = _ink(thing)[..., None]
            # Blend the ink over the background, in 16ths.
            under_SSC += (_INK - under_SSC) * ink_SSC // _LEVELS
    return Image.fromarray(canvas_HWC.clip(0, 255).astype(np.uint8))


def _mask(thing: Shape, dx: int, dy: int) -> NDArray[np.bool_]:
    """Return the pixels of an object in its cell; offsets are in half pixels."""
    middle_S = 2 * np.arange(CELL) + 1 - CELL
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


def _ink(thing: Digit) -> NDArray[np.int64]:
    """Return the ink of a digit from 0 to 16, its 8 x 8 pixels enlarged to 16 x 16."""
    small_88 = _collected()[thing.sample]
    return np.repeat(np.repeat(small_88, 2, axis=0), 2, axis=1)


@functools.cache
def _collected() -> NDArray[np.int64]:
    """Return scikit-learn's handwritten digits, [N, 8, 8]."""
    from sklearn.datasets import load_digits

    images: NDArray[np.int64] = load_digits().images.astype(np.int64)
    return images
