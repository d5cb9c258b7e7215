"""Real handwritten digits that ship with scikit-learn, so nothing has to be downloaded.

1,797 grey images of 8x8 pixels with 17 levels: the test part of Optical Recognition of Handwritten
Digits (Alpaydin and Kaynak, 1998, UCI), as shipped by `sklearn.datasets.load_digits`. The first
1,200 images are for training and the last 597 for testing; the last 200 training images are held
out for choosing hyperparameters.
"""

from __future__ import annotations

import torch

from bench.data.images.sets import Splits, TensorSet

# Split by position: the images are in the order in which they were collected, so most writers of
# the test images wrote none of the training images. A random split would mix the writers.
TRAIN = 1200
HELD_OUT = 200
LEVELS = 16
SHIFT = 1


def digits() -> Splits:
    """Load the digits; training images are shifted by up to one pixel in each direction."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixel_NCHH = torch.tensor(bunch.images).mul(255 / LEVELS).round().to(torch.uint8)[:, None]
    label_N = torch.tensor(bunch.target)
    # Statistics of the training images only: the test images must not influence the model.
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
