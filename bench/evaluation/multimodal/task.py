"""The harness's task object around documents that are loaded already."""

from __future__ import annotations

from typing import Any

import datasets
import lmms_eval.api.metrics  # noqa: F401  # registers the metrics that task files name
from lmms_eval.api.task import ConfigurableTask

from bench.evaluation.multimodal.definition import evaluated_split


class LoadedTask(ConfigurableTask):  # type: ignore[misc]  # the harness has no types
    """A task of lmms-eval in everything but the download of its data."""

    def __init__(self, defined: dict[str, Any], rows: datasets.Dataset) -> None:
        self._rows = rows
        super().__init__(config=defined)

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Take the documents as they are, and a copy without images for what reads only text."""
        split = evaluated_split(dict(vars(self.config)))
        images = [n for n, kind in self._rows.features.items() if isinstance(kind, datasets.Image)]
        self.dataset = datasets.DatasetDict({split: self._rows})
        self.dataset_no_image = datasets.DatasetDict({split: self._rows.remove_columns(images)})
