"""Real handwritten digits that come with scikit-learn, so that nothing need be downloaded.

1,797 grey images of 8x8 with 17 levels: the test part of Optical Recognition of Handwritten
Digits (Alpaydin and Kaynak, 1998, UCI), as `sklearn.datasets.load_digits` ships it. They are in
the order in which they were collected, so the split is by position and the writers of the test
images are mostly not those of the training images: the first 1,200 train, the last 597 test. Of
the training images the last 200 are held out where something has to be chosen.
"""

from __future__ import annotations

import torch

from bench.data.images.sets import Splits, TensorSet

TRAIN = 1200
HELD_OUT = 200
LEVELS = 16
SHIFT = 1


def digits() -> Splits:
    """Return the digits; training images are moved by up to one pixel in each direction."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixel_NCHH = torch.tensor(bunch.images).mul(255 / LEVELS).round().to(torch.uint8)[:, None]
    label_N = torch.tensor(bunch.target)
    train = pixel_NCHH[:TRAIN].float() / 255
    statistics = ((float(train.mean()),), (float(train.std()),))
    return Splits(
        name="digits",
        train=TensorSet(pixel_NCHH[:TRAIN], label_N[:TRAIN], statistics, shift=SHIFT),
        test=TensorSet(pixel_NCHH[TRAIN:], label_N[TRAIN:], statistics),
        channels=1,
        size=8,
        classes=10,
        provenance="sklearn.datasets.load_digits, first 1200 train, last 597 test",
        held_out=HELD_OUT,
    )
