"""Documents and images of one task: from files, drawn scenes, or the hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import datasets
from PIL import Image

from bench.data import hub
from bench.data.image_files import UnfitImage, open_images, refuse_clipped
from bench.evaluation import local_files
from bench.evaluation.harness import DocumentSource
from bench.evaluation.row_files import DataRow
from bench.evaluation.task_planning import (
    TaskDefinition,
    evaluated_split,
    hub_options,
    load_from_hub,
)
from bench.schema import BenchmarkConfig

INSTRUCTIONS_SUFFIX, IMAGES_SUFFIX = "_instructions", "_images"
"""Suffixes of the two configurations of a data set whose documents only name images (GQA)."""


@dataclass(frozen=True)
class ImageIndex:
    """Images by name, for documents that do not contain theirs; decoded on access."""

    rows: datasets.Dataset

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.rows["id"])}

    def doc_to_visual(self, document: DataRow) -> list[Image.Image]:
        """Return the image of a document, like lmms-eval's function of this name.

        Raises:
            UnfitImage: there is no image of this name, or it cannot be shown.
        """
        name = document["imageId"]
        if name not in self._row_of:
            raise UnfitImage(f"no image is named {name!r}")
        image = open_images(lambda: self.rows[self._row_of[name]]["image"])
        return [open_images(lambda: refuse_clipped(image).convert("RGB"))]


class DocToVisual(Protocol):
    """A task's function from a document to its images."""

    def __call__(self, document: DataRow) -> list[Image.Image]:
        """Open the images of a document."""


class DocToParts(Protocol):
    """A task's function from a document to its texts and images, in the order shown."""

    def __call__(self, document: DataRow) -> list[str | Image.Image]:
        """Open the images of a document, and put them among its texts."""


def image_columns(rows: datasets.Dataset) -> list[str]:
    """Return the columns with images or lists of images."""
    return [name for name, kind in rows.features.items() if _holds_images(kind)]


def _holds_images(kind: object) -> bool:
    inner = kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", kind)
    return isinstance(inner, datasets.Image)


def open_document_images(
    doc_to_visual: DocToVisual, rows: datasets.Dataset, position: int
) -> list[Image.Image]:
    """Open the images of one document of a task.

    Raises:
            UnfitImage: an image is missing, or cannot be shown to a model.
    """
    return open_images(lambda: list(doc_to_visual(_decoded(rows, position))))


def open_document_parts(
    doc_to_parts: DocToParts, rows: datasets.Dataset, position: int
) -> list[str | Image.Image]:
    """Open the images of one document of a task, among its texts.

    Raises:
            UnfitImage: an image is missing, or cannot be shown to a model.
    """
    return open_images(lambda: doc_to_parts(_decoded(rows, position)))


def _decoded(rows: datasets.Dataset, position: int) -> DataRow:
    document: DataRow = rows[position]  # `datasets` decodes the images of a row here.
    columns = image_columns(rows)
    for column in columns:
        value = document[column]
        # Data sets with several image columns leave those empty that a question does not use.
        if value is None and len(columns) == 1:
            raise UnfitImage(f"it has no image in column {column!r}")
        # Before the task's own code, which converts to RGB.
        for image in value if isinstance(value, list) else [value]:
            if image is not None:
                refuse_clipped(image)
    return document


@dataclass(frozen=True)
class ImageDocuments:
    """A task's scored documents; `images` has their images if the documents only name them."""

    rows: datasets.Dataset
    images: ImageIndex | None
    source: DocumentSource


def load_image_documents(
    name: str, definition: TaskDefinition, benchmark: BenchmarkConfig
) -> ImageDocuments:
    """Return the documents of a task in a benchmark, and their origin."""
    path = benchmark.data.get(name)
    if path is not None:
        return _from_files(name, path, definition)
    if benchmark.suite == "micro":
        return _from_scenes(definition)
    return _from_hub(definition)


def _from_files(name: str, path: str, definition: TaskDefinition) -> ImageDocuments:
    part, split = definition.get("dataset_name"), evaluated_split(definition)
    rows, source = local_files.read_image_rows(name, path, part, split)
    if "image" in rows.column_names or not _has_separate_images(definition):
        return ImageDocuments(rows, None, source)
    images, images_source = local_files.read_separate_images(
        name, path, _images_config(definition), split
    )
    return ImageDocuments(rows, ImageIndex(images), _combined_source(source, images_source))


def _from_scenes(definition: TaskDefinition) -> ImageDocuments:
    scenes = definition["dataset_name"]
    drawn = scene_rows(scenes)
    apart = [] if "image" in drawn[0] else scene_images(scenes)
    images = ImageIndex(datasets.Dataset.from_list(apart)) if apart else None
    # Hashed as drawn here, because drawing them again takes as long as the rest of planning.
    source = scene_source(scenes, [*drawn, *apart])
    return ImageDocuments(datasets.Dataset.from_list(drawn), images, source)


def _from_hub(definition: TaskDefinition) -> ImageDocuments:
    split = evaluated_split(definition)
    data, source = load_from_hub(definition)
    if not _has_separate_images(definition):
        return ImageDocuments(data[split], None, source)
    # GQA stores questions and images as two configurations. The harness's own function would load
    # the second one from the hub during the evaluation.
    images = hub.load_dataset(
        definition["dataset_path"], _images_config(definition), **hub_options(definition)
    )
    return ImageDocuments(data[split], ImageIndex(images[split]), source)


def _has_separate_images(definition: TaskDefinition) -> bool:
    return str(definition.get("dataset_name")).endswith(INSTRUCTIONS_SUFFIX)


def _images_config(definition: TaskDefinition) -> str:
    return str(definition["dataset_name"]).removesuffix(INSTRUCTIONS_SUFFIX) + IMAGES_SUFFIX


def _combined_source(documents: DocumentSource, images: DocumentSource) -> DocumentSource:
    joined = hashlib.sha256(f"{documents.fingerprint}{images.fingerprint}".encode()).hexdigest()
    return DocumentSource("file", documents.location, None, joined)


SCENES_PATH = "scenes"
"""Value of `dataset_path` in our task files."""


def scene_rows(scenes: str) -> list[DataRow]:
    """Return the documents of a task on scenes, in the real data set's schema."""
    from bench.data.synthetic.scenes import documents

    rows: list[DataRow] = documents(scenes)
    return rows


def scene_images(scenes: str) -> list[DataRow]:
    """Return the images of a task whose documents only name them."""
    from bench.data.synthetic.scenes import scene_images

    rows: list[DataRow] = scene_images(scenes)
    return rows


def scene_source(scenes: str, rows: list[DataRow]) -> DocumentSource:
    """Return the origin of a task's embedded documents, given all of its rows."""
    from bench.data.synthetic.scenes import rows_fingerprint

    return DocumentSource("embedded", f"{SCENES_PATH}:{scenes}", None, rows_fingerprint(rows))
