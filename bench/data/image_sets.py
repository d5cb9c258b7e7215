"""Image data sets with normalised batches by index, and the order of batches.

Order and augmentation are pure functions of seed, epoch and batch number, so a resumed run sees
exactly the images of an uninterrupted one.

Shapes: N images of the set, B of a batch, C channels, H height and width, P = H + 2 * shift padded.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from bench.data.digests import file_states
from bench.data.image_files import UnfitImage, open_images
from bench.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


class ImageSet(ABC):
    """Labelled images; `fetch` normalises them, and augments them if given a generator."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fetch(self, index_B: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return image_BCHH (float32) and label_B (int64) at the given indices."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return an identifier of exactly these images and labels."""

    @property
    def unread(self) -> str | None:
        """What the fingerprint does not cover by content, or None."""
        return None


@dataclass(frozen=True)
class ImageShape:
    """Input and output of a classifier: colour channels, height = width, number of classes."""

    channels: int
    size: int
    classes: int


@dataclass(frozen=True)
class Splits:
    """Training and test images of a data set, with facts for a record.

    The last `held_out` training images are for choosing hyperparameters, see `for_selection`.
    """

    name: str
    train: ImageSet
    test: ImageSet
    channels: int
    size: int
    classes: int
    provenance: str
    held_out: int = 0

    @property
    def shape(self) -> ImageShape:
        """Input and output sizes of a classifier for these images."""
        return ImageShape(self.channels, self.size, self.classes)

    def for_selection(self) -> Splits:
        """Return splits for choosing a strength or a schedule without using the test images.

        `test` are the last `held_out` training images and `train` the others. A network with the
        chosen hyperparameters is then trained on the whole original `train` and tested once.

        Raises:
            UserError: no images are held out, because the training images are sorted.
        """
        if not self.held_out:
            raise UserError(f"{self.name} has no images held out for validation: use split=test")
        count = len(self.train) - self.held_out
        return replace(
            self,
            train=Subset(self.train, range(count)),
            test=Subset(self.train, range(count, len(self.train))),
            provenance=f"{self.provenance}; the last {self.held_out} training images held out",
            held_out=0,  # A second call is refused, because no images are left to hold out.
        )


class TensorSet(ImageSet):
    """Images in memory as uint8."""

    def __init__(
        self,
        pixel_NCHH: Tensor,
        label_N: Tensor,
        statistics: Statistics,
        shift: int = 0,
        flip: bool = False,
    ) -> None:
        self.pixel_NCHH = pixel_NCHH
        self.label_N = label_N.long()
        self._mean_C11 = torch.tensor(statistics[0])[:, None, None]
        self._std_C11 = torch.tensor(statistics[1])[:, None, None]
        self._shift, self._flip = shift, flip

    def __len__(self) -> int:
        return len(self.label_N)

    def fetch(self, index_B: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the images; augmentation shifts by up to `shift` pixels and mirrors at random."""
        image_BCHH = self.pixel_NCHH[index_B].float().div_(255)
        image_BCHH = (image_BCHH - self._mean_C11) / self._std_C11
        if generator is not None:
            image_BCHH = self._augment(image_BCHH, generator)
        return image_BCHH, self.label_N[index_B]

    def fingerprint(self) -> str:
        """Return the SHA-256 over all pixels and labels."""
        digest = hashlib.sha256(self.pixel_NCHH.numpy().tobytes())
        digest.update(self.label_N.numpy().tobytes())
        return digest.hexdigest()

    def _augment(self, image_BCHH: Tensor, generator: torch.Generator) -> Tensor:
        count, size = len(image_BCHH), image_BCHH.shape[-1]
        if self._shift:
            # Each image has its own shift, so one advanced index gathers a window per image from
            # the padded batch, where slicing would need a loop. Padding follows normalisation, so
            # that the border has the mean colour.
            moves = 2 * self._shift + 1
            shift_B2 = torch.randint(moves, (count, 2), generator=generator)
            place_BH = torch.arange(size) + shift_B2[:, :1]
            column_BH = torch.arange(size) + shift_B2[:, 1:]
            padded_BCPP = pad(image_BCHH, [self._shift] * 4)
            each_B11 = torch.arange(count)[:, None, None]
            moved_BHHC = padded_BCPP.permute(0, 2, 3, 1)[
                each_B11, place_BH[:, :, None], column_BH[:, None, :]
            ]
            image_BCHH = moved_BHHC.permute(0, 3, 1, 2).contiguous()
        if self._flip:
            mirrored_B = torch.rand(count, generator=generator) < 0.5
            mirrored_B111 = mirrored_B[:, None, None, None]
            image_BCHH = torch.where(mirrored_B111, image_BCHH.flip(-1), image_BCHH)
        return image_BCHH


class Subset(ImageSet):
    """Consecutive images of a larger set."""

    def __init__(self, whole: ImageSet, places: range) -> None:
        self._whole, self._places = whole, places

    def __len__(self) -> int:
        return len(self._places)

    def fetch(self, index_B: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Fetch from the larger set, with indices relative to this subset."""
        return self._whole.fetch(index_B + self._places.start, generator)

    def fingerprint(self) -> str:
        """Return the fingerprint of the larger set with the range that is used."""
        return f"{self._whole.fingerprint()}[{self._places.start}:{self._places.stop}]"

    @property
    def unread(self) -> str | None:
        """What the larger set's fingerprint does not cover by content."""
        return self._whole.unread


class _DecodedImages(Protocol):
    """torchvision's ImageFolder: an image and its label by index."""

    samples: Sequence[tuple[str, int]]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image, int]: ...


ImageTransform = Callable[["Image"], Tensor]


class FolderSet(ImageSet):
    """Images decoded from files on access, with one subfolder per class.

    `test` and `training` are torchvision transforms from a PIL image to a tensor [C, H, H].
    """

    def __init__(
        self, folder: _DecodedImages, test: ImageTransform, training: ImageTransform
    ) -> None:
        self._folder, self._test, self._training = folder, test, training

    def __len__(self) -> int:
        return len(self._folder)

    def fetch(self, index_B: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Decode the images; given a generator, apply the random `training` transform.

        Raises:
            UnfitImage: a file cannot be decoded; the message names it.
        """
        images, labels = [], []
        for index in index_B.tolist():
            image, label = self._decoded(index)
            labels.append(label)
            if generator is None:
                images.append(self._test(image))
                continue
            # torchvision's transforms draw from torch's global generator, so it is seeded per image
            # inside a fork, which restores its state for the training. With `devices=[]` the fork
            # does not save the state of every GPU.
            seed = int(torch.randint(2**62, (), generator=generator))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                images.append(self._training(image))
        return torch.stack(images), torch.tensor(labels)

    def _decoded(self, index: int) -> tuple[Image, int]:
        try:
            return open_images(lambda: self._folder[index])
        except UnfitImage as error:
            raise UnfitImage(f"{self._folder.samples[index][0]}: {error}") from error

    def fingerprint(self) -> str:
        """Return the SHA-256 over file names, labels and contents (or sizes and times if many)."""
        total = hashlib.sha256()
        states, _ = self._states
        for name, label in self._folder.samples:
            file = Path(name)
            total.update(f"{file.parent.name}/{file.name} {states[name]} {label}\n".encode())
        return total.hexdigest()

    @property
    def unread(self) -> str | None:
        """What the fingerprint covers only by sizes and times, None if it covers all contents."""
        return self._states[1]

    @cached_property
    def _states(self) -> tuple[dict[str, str], str | None]:
        return file_states({name: Path(name) for name, _ in self._folder.samples})


_PRIME = 1_000_003


def training_batches(
    images: ImageSet, size: int, *, seed: int, epoch: int, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the augmented training batches of one epoch, starting at batch `start`.

    Seed and epoch determine the permutation. A last, smaller batch is dropped.

    Yields:
        image_BCHH (float32) and label_B (int64).
    """
    order_N = torch.randperm(len(images), generator=_generator(seed, epoch, 0))
    # One generator per batch, so that a resumed run draws the augmentation of batch `start` without
    # repeating earlier batches. The last partial batch is dropped because BatchNorm cannot
    # normalise a batch of one.
    for place in range(start, len(images) // size):
        index_B = order_N[place * size : (place + 1) * size]
        yield images.fetch(index_B, _generator(seed, epoch, place + 1))


def sequential_batches(images: ImageSet, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all images once, in order and without augmentation."""
    for index_B in torch.arange(len(images)).split(size):
        yield images.fetch(index_B, None)


def _generator(seed: int, epoch: int, place: int) -> torch.Generator:
    # A polynomial in a large prime: different (seed, epoch, place) have different streams while
    # epoch and place are below it. Place 0 is the permutation, so batches count from 1.
    return torch.Generator().manual_seed((seed * _PRIME + epoch) * _PRIME + place)
