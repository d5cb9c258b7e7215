"""Order of training batches, reproducible after a restart.

Shapes: N images of the set, B images of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.data.images.sets import ImageSet

_PRIME = 1_000_003


def batches(
    images: ImageSet, size: int, *, seed: int, epoch: int, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the augmented training batches of one epoch, starting at batch `start`.

    Seed and epoch fix the permutation. A last, smaller batch is dropped.

    Yields:
        image_BCHH (float32) and label_B (int64).
    """
    order_N = torch.randperm(len(images), generator=_generator(seed, epoch, 0))
    # One generator per batch, so that a resumed run draws the augmentation of batch `start`
    # without replaying the batches before it. The last partial batch is dropped because BatchNorm
    # cannot normalise a batch of one.
    for place in range(start, len(images) // size):
        index_B = order_N[place * size : (place + 1) * size]
        yield images.fetch(index_B, _generator(seed, epoch, place + 1))


def in_order(images: ImageSet, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all images once, in order and without augmentation."""
    for index_B in torch.arange(len(images)).split(size):
        yield images.fetch(index_B, None)


def _generator(seed: int, epoch: int, place: int) -> torch.Generator:
    # A polynomial in a large prime: different (seed, epoch, place) get different streams as long as
    # epoch and place stay below it. Place 0 is the permutation, so batches count from 1.
    return torch.Generator().manual_seed((seed * _PRIME + epoch) * _PRIME + place)
