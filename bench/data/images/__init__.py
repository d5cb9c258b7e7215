"""Image data sets for classification: embedded handwritten digits and torchvision data sets."""

from bench.data.images.batches import batches
from bench.data.images.catalogue import SETS, load, shape
from bench.data.images.sets import FolderSet, ImageSet, Part, Shape, Splits, TensorSet

__all__ = [
    "SETS",
    "FolderSet",
    "ImageSet",
    "Part",
    "Shape",
    "Splits",
    "TensorSet",
    "batches",
    "load",
    "shape",
]
