"""lmms-eval's task object around documents that are already loaded."""

from __future__ import annotations

from typing import Any

import datasets
import lmms_eval.api.metrics  # noqa: F401  # registers the metrics that task files name
from lmms_eval.api.task import ConfigurableTask

from bench.evaluation.multimodal.definition import evaluated_split


class LoadedTask(ConfigurableTask):  # type: ignore[misc]  # the harness has no types
    """A task of lmms-eval in everything but the download of its data."""

    def __init__(self, defined: dict[str, Any], rows: datasets.Dataset) -> None:
        # Before the base class, whose constructor calls `download`.
        self._rows = rows
        super().__init__(config=defined)

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Install the documents, and a copy without images for code that reads text only."""
        split = evaluated_split(dict(vars(self.config)))
        images = [n for n, kind in self._rows.features.items() if isinstance(kind, datasets.Image)]
        self.dataset = datasets.DatasetDict({split: self._rows})
        self.dataset_no_image = datasets.DatasetDict({split: self._rows.remove_columns(images)})
