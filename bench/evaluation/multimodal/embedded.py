"""Drawn scenes, as the data sets that task files ask for."""

from __future__ import annotations

from typing import Any

from bench.evaluation.source import Source

LOCATION = "scenes"
"""Value of `dataset_path` in our task files."""


def rows(scenes: str) -> list[dict[str, Any]]:
    """Return the documents of a task on scenes, in the real data set's schema."""
    from bench.data.scenes import documents

    found: list[dict[str, Any]] = documents(scenes)
    return found


def images(scenes: str) -> list[dict[str, Any]]:
    """Return the images of a task whose documents only name them."""
    from bench.data.scenes import images

    found: list[dict[str, Any]] = images(scenes)
    return found


def source(scenes: str) -> Source:
    """Describe the embedded documents of a task."""
    from bench.data.scenes import fingerprint

    return Source("embedded", f"{LOCATION}:{scenes}", None, fingerprint(scenes))
