"""Documents and images of one task: files, drawn scenes, the hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
from PIL import Image

from bench.data import hub
from bench.evaluation import local_files
from bench.evaluation.harness import DocumentSource, hub_source
from bench.evaluation.multimodal.task_index import evaluated_split
from bench.schema import BenchmarkConfig

INSTRUCTIONS_SUFFIX, IMAGES_SUFFIX = "_instructions", "_images"
"""Suffixes of the two configurations of a data set whose documents only name images (GQA)."""


@dataclass(frozen=True)
class ImageIndex:
    """Images by name, for documents that do not contain theirs; decoded on access."""

    rows: datasets.Dataset

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.rows["id"])}

    def doc_to_visual(self, document: dict[str, Any]) -> list[Image.Image]:
        """Return the image of a document, as lmms-eval's function of this name does."""
        return [self.rows[self._places[document["imageId"]]]["image"].convert("RGB")]


@dataclass(frozen=True)
class ImageDocuments:
    """A task's scored documents; `album` holds their images if they do not contain them."""

    rows: datasets.Dataset
    album: ImageIndex | None
    source: DocumentSource


def load_image_documents(
    name: str, defined: dict[str, Any], benchmark: BenchmarkConfig
) -> ImageDocuments:
    """Return the documents that a benchmark gives a task, and where they came from."""
    path = benchmark.data.get(name)
    if path is not None:
        return _from_files(name, path, defined)
    if benchmark.suite == "micro":
        return _from_scenes(defined)
    return _from_hub(defined)


def _from_files(name: str, path: str, defined: dict[str, Any]) -> ImageDocuments:
    part, split = defined.get("dataset_name"), evaluated_split(defined)
    rows, source = local_files.read_image_rows(name, path, part, split)
    if "image" in rows.column_names or not _has_separate_images(defined):
        return ImageDocuments(rows, None, source)
    images, beside = local_files.read_separate_images(name, path, _images_config(defined), split)
    return ImageDocuments(rows, ImageIndex(images), _combined_source(source, beside))


def _from_scenes(defined: dict[str, Any]) -> ImageDocuments:
    scenes = defined["dataset_name"]
    rows = datasets.Dataset.from_list(scene_rows(scenes))
    album = None
    if "image" not in rows.column_names:
        album = ImageIndex(datasets.Dataset.from_list(scene_images(scenes)))
    return ImageDocuments(rows, album, scene_source(scenes))


def _from_hub(defined: dict[str, Any]) -> ImageDocuments:
    location = (defined["dataset_path"], defined.get("dataset_name"))
    split = evaluated_split(defined)
    options = dict(defined.get("dataset_kwargs") or {})
    options.pop("token", None)  # task files demand a login even for public data sets
    data = hub.load_dataset(*location, **options)
    source = hub_source(
        hub.dataset_name(*location), hub.commit_of(data), _content_fingerprint(data)
    )
    if not _has_separate_images(defined):
        return ImageDocuments(data[split], None, source)
    # GQA stores questions and images as two configurations. The harness's own function would load
    # the second one from the hub in the middle of the evaluation.
    images = hub.load_dataset(location[0], _images_config(defined), **options)
    return ImageDocuments(data[split], ImageIndex(images[split]), source)


def _has_separate_images(defined: dict[str, Any]) -> bool:
    return str(defined.get("dataset_name")).endswith(INSTRUCTIONS_SUFFIX)


def _images_config(defined: dict[str, Any]) -> str:
    return str(defined["dataset_name"]).removesuffix(INSTRUCTIONS_SUFFIX) + IMAGES_SUFFIX


def _combined_source(documents: DocumentSource, images: DocumentSource) -> DocumentSource:
    joined = hashlib.sha256(f"{documents.fingerprint}{images.fingerprint}".encode()).hexdigest()
    return DocumentSource("file", documents.location, None, joined)


def _content_fingerprint(data: dict[str, Any]) -> str:
    return "-".join(str(split._fingerprint) for _, split in sorted(data.items()))


SCENES_PATH = "scenes"
"""Value of `dataset_path` in our task files."""


def scene_rows(scenes: str) -> list[dict[str, Any]]:
    """Return the documents of a task on scenes, in the real data set's schema."""
    from bench.data.synthetic.scenes import documents

    found: list[dict[str, Any]] = documents(scenes)
    return found


def scene_images(scenes: str) -> list[dict[str, Any]]:
    """Return the images of a task whose documents only name them."""
    from bench.data.synthetic.scenes import scene_images

    found: list[dict[str, Any]] = scene_images(scenes)
    return found


def scene_source(scenes: str) -> DocumentSource:
    """Describe the embedded documents of a task."""
    from bench.data.synthetic.scenes import fingerprint

    return DocumentSource("embedded", f"{SCENES_PATH}:{scenes}", None, fingerprint(scenes))
