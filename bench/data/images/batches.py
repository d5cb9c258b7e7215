"""The order of training: which images form which batch, the same after every restart.

Shapes: B images of a batch.
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
    """Yield the augmented training batches of one epoch from batch `start` on.

    The order is a permutation that seed and epoch fix; a last, smaller batch is left out, for
    BatchNorm cannot normalise a batch of one.
    """
    order_N = torch.randperm(len(images), generator=_generator(seed, epoch, 0))
    for place in range(start, len(images) // size):
        index_B = order_N[place * size : (place + 1) * size]
        yield images.fetch(index_B, _generator(seed, epoch, place + 1))


def in_order(images: ImageSet, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all images once, in their order and without augmentation."""
    for index_B in torch.arange(len(images)).split(size):
        yield images.fetch(index_B, None)


def _generator(seed: int, epoch: int, place: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * _PRIME + epoch) * _PRIME + place)
