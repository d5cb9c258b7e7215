"""Documents and images of one task: from files, the drawn scenes, or the hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
from PIL import Image

from bench.data import hub
from bench.evaluation.config import BenchmarkConfig
from bench.evaluation.multimodal import embedded, local_files
from bench.evaluation.multimodal.definition import evaluated_split
from bench.evaluation.source import Source, hub_source

INSTRUCTIONS, IMAGES = "_instructions", "_images"
"""Suffixes of the two configurations of a data set whose documents only name images (GQA)."""


@dataclass(frozen=True)
class Album:
    """Images by name, for documents that do not contain theirs; decoded on access."""

    rows: datasets.Dataset

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.rows["id"])}

    def doc_to_visual(self, document: dict[str, Any]) -> list[Image.Image]:
        """Return the image of a document, as lmms-eval's function of this name does."""
        return [self.rows[self._places[document["imageId"]]]["image"].convert("RGB")]


@dataclass(frozen=True)
class Documents:
    """A task's scored documents; `album` holds their images if they do not contain them."""

    rows: datasets.Dataset
    album: Album | None
    source: Source


def load(name: str, defined: dict[str, Any], benchmark: BenchmarkConfig) -> Documents:
    """Return the documents that a benchmark gives a task, and where they came from."""
    path = benchmark.data.get(name)
    if path is not None:
        return _from_files(name, path, defined)
    if benchmark.suite == "micro":
        return _from_scenes(defined)
    return _from_hub(defined)


def _from_files(name: str, path: str, defined: dict[str, Any]) -> Documents:
    part, split = defined.get("dataset_name"), evaluated_split(defined)
    rows, source = local_files.read(name, path, part, split)
    if "image" in rows.column_names or not _is_split_in_two(defined):
        return Documents(rows, None, source)
    images, beside = local_files.read_images(name, path, _images_of(defined), split)
    return Documents(rows, Album(images), _both(source, beside))


def _from_scenes(defined: dict[str, Any]) -> Documents:
    scenes = defined["dataset_name"]
    rows = datasets.Dataset.from_list(embedded.rows(scenes))
    album = None
    if "image" not in rows.column_names:
        album = Album(datasets.Dataset.from_list(embedded.images(scenes)))
    return Documents(rows, album, embedded.source(scenes))


def _from_hub(defined: dict[str, Any]) -> Documents:
    location = (defined["dataset_path"], defined.get("dataset_name"))
    split = evaluated_split(defined)
    options = dict(defined.get("dataset_kwargs") or {})
    options.pop("token", None)  # task files demand a login even for public data sets
    data = hub.load(*location, **options)
    source = hub_source(hub.spell(*location), hub.commit_of(data), _content(data))
    if not _is_split_in_two(defined):
        return Documents(data[split], None, source)
    # GQA stores questions and images as two configurations. The harness's own function would load
    # the second one from the hub in the middle of the evaluation.
    images = hub.load(location[0], _images_of(defined), **options)
    return Documents(data[split], Album(images[split]), source)


def _is_split_in_two(defined: dict[str, Any]) -> bool:
    return str(defined.get("dataset_name")).endswith(INSTRUCTIONS)


def _images_of(defined: dict[str, Any]) -> str:
    return str(defined["dataset_name"]).removesuffix(INSTRUCTIONS) + IMAGES


def _both(documents: Source, images: Source) -> Source:
    joined = hashlib.sha256(f"{documents.fingerprint}{images.fingerprint}".encode()).hexdigest()
    return Source("file", documents.location, None, joined)


def _content(data: dict[str, Any]) -> str:
    return "-".join(str(split._fingerprint) for _, split in sorted(data.items()))
