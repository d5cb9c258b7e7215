"""Real handwritten digits that ship with scikit-learn, so nothing has to be downloaded.

1,797 grey images of 8x8 pixels with 17 levels: the test part of Optical Recognition of Handwritten
Digits (Alpaydin and Kaynak, 1998, UCI), as shipped by `sklearn.datasets.load_digits`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Split by position: the images are in the order in which they were collected, so most writers of
# the test images wrote none of the training images. A random split would mix the writers. Drawn
# scenes use the same split, so that a digit is never in the training of one task and the test of
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
